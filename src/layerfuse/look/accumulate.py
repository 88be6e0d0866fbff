"""What one streaming pass over pictures accumulates about every layer.

Patch tokens only: prefix tokens (CLS, registers) never reach it. Memory does not grow with the
number of pictures. Every result is independent of the batches in which pictures arrive.

Linear centred kernel alignment (CKA) comes from Gram matrices. Kornblith et al. 2019 define it by
HSIC; Song et al. 2012 (eq. 5) give the unbiased HSIC, and Nguyen et al. 2021 average it over
blocks, so that its expectation does not depend on their size where examples are independent; tokens
of one picture are not, and fewer pictures raise token CKA. The biased HSIC (Gretton et al. 2005)
grows towards 1 as a block has fewer examples than dimensions.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from layerfuse.vision.features import Features

BLOCK_IMAGES, BLOCK_TOKENS = 64, 512
"""Examples of one CKA block: pictures (each its mean token), and tokens drawn from them."""
KEPT_IMAGES, KEPT_TOKENS = 256, 2048
"""The seeded sample of tokens that is kept: for what needs the mean token first, and for scores."""
KINDS = {"": True, "_biased": False}
MINIMUM = 4
"""Examples that the unbiased estimator needs."""


class LayerStatistics:
    """Sums over `total` pictures for the layers of one encoder, and CKA with those of others.

    The first encoder gives the cosines, scores and norms; all give CKA. The first picture decides
    shapes. `seed` draws the tokens: which of them depends on the picture's place only.
    """

    def __init__(self, total: int, seed: int = 0) -> None:
        self.total, self.seed = total, seed
        self.done = self.layers = 0
        self.sums: dict[str, Tensor] = {}
        self.tokens: list[list[Tensor]] = []  # per encoder, per picture of the block: (L, t, D)
        self.means: list[list[Tensor]] = []  # the same, (L, 1, D)
        self.kept: list[Tensor] = []  # per picture of the sample: (L, t, D)
        order = np.random.default_rng(seed).permutation(total)
        self.sample = set(order[:KEPT_IMAGES].tolist())

    def add(self, encoders: Sequence[Features], names: Sequence[str]) -> None:
        """Add a batch, seen by each encoder. Raises ValueError naming a picture with infinities."""
        grid = encoders[0].grid
        maps = [encoders[0].patches, *(_resample(other, grid) for other in encoders[1:])]
        self.layers = sum(map(len, maps))
        self.tokens = self.tokens or [[] for _ in maps]
        self.means = self.means or [[] for _ in maps]
        for row, name in enumerate(names):
            for tower, patches in enumerate(maps):
                self._add(tower, torch.stack([p[row] for p in patches], dim=1), name)
            self.done += 1
            if len(self.means[0]) == BLOCK_IMAGES:
                self._flush()

    def _add(self, tower: int, layers: Tensor, name: str) -> None:
        """One picture's tokens (N, L, D) in one encoder."""
        tokens = layers.float()
        products = tokens @ tokens.mT  # (N, L, L): norms and cosines in one reading of the tokens
        squares = products.diagonal(dim1=1, dim2=2)
        finite = squares.isfinite().all(dim=0)
        if not finite.all():
            layer = int((~finite).nonzero()[0])
            raise ValueError(f"layer {layer} of {name} holds infinite or undefined features")
        count = len(tokens)
        positions = np.random.default_rng([self.seed, self.done]).permutation(count)
        drawn = min(count, BLOCK_TOKENS // min(self.total, BLOCK_IMAGES))
        kept = min(count, KEPT_TOKENS // min(self.total, KEPT_IMAGES))
        mean = tokens.mean(dim=0)
        self.tokens[tower].append(layers[positions[:drawn]].transpose(0, 1))
        self.means[tower].append(mean[:, None])
        if tower:
            return
        norms = squares.sqrt()
        scale = norms.clamp_min(1e-30).reciprocal()
        self._sum("cosine", (products * scale[:, :, None] * scale[:, None]).mean(dim=0))
        self._sum("mean", mean)
        self._sum("norm", norms.mean(dim=0))
        if self.done in self.sample:
            self.kept.append(layers[positions[:kept]].transpose(0, 1).cpu())

    def _sum(self, name: str, value: Tensor) -> None:
        found = value.detach().cpu().double()
        self.sums[name] = self.sums[name] + found if name in self.sums else found

    def _flush(self) -> None:
        """Turn the block into HSICs, weighted by its number of pictures."""
        for name, block in (("tokens", self.tokens), ("images", self.means)):
            stacked = [layer for tower in block for layer in torch.cat(tower, dim=1)]
            if len(stacked[0]) >= MINIMUM:
                kernels, weight = grams(stacked), len(self.means[0])
                for kind, debiased in KINDS.items():
                    self._sum(f"cka_{name}{kind}", weight * hsic(kernels, debiased))
                squares = [x.float().square().sum(dim=1).mean() for x in stacked]
                self._sum(f"energy_{name}", weight * torch.stack(squares))
                self._sum(f"weight_{name}", torch.tensor(weight))
        self.tokens, self.means = [[] for _ in self.tokens], [[] for _ in self.means]

    def state(self) -> dict[str, Tensor]:
        """All that `restore` needs, as tensors."""
        found = {f"sums.{name}": value for name, value in self.sums.items()}
        found["done"] = torch.tensor(self.done)
        for name, block in (("tokens", self.tokens), ("means", self.means)):
            for tower, pictures in enumerate(block):
                if pictures:
                    found[f"{name}.{tower}"] = torch.stack(pictures).cpu()
        if self.kept:
            found["kept"] = torch.stack(self.kept)
        found["shape"] = torch.tensor([len(self.tokens), self.layers])
        return found

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from a saved state of the same pictures and seed."""
        self.done = int(state["done"])
        self.sums = {k[5:]: v for k, v in state.items() if k.startswith("sums.")}
        self.kept = list(state.get("kept", ()))
        towers, self.layers = range(int(state["shape"][0])), int(state["shape"][1])
        self.tokens, self.means = (
            [[x.to(device) for x in state.get(f"{name}.{t}", ())] for t in towers]
            for name in ("tokens", "means")
        )

    def result(self) -> dict[str, Any]:
        """Matrices of the first encoder's L layers, `cross` (L, M) with those of the others.

        An entry is NaN where it is undefined: a layer that does not vary, or too few examples.
        """
        if self.means[0]:
            self._flush()
        first = len(self.sums["norm"])
        means = {x: (self.sums[x] / self.done).numpy() for x in ("cosine", "norm", "mean")}
        found: dict[str, Any] = {"images": self.done, **means}
        zero = np.diag(found["cosine"]) == 0
        found["cosine"][zero], found["cosine"][:, zero] = np.nan, np.nan
        for name in ("tokens", "images"):
            for kind in KINDS:
                whole = self._cka(name, kind)
                found[f"cka_{name}{kind}"] = whole[:first, :first]
                found[f"cross_{name}{kind}"] = whole[:first, first:]
        found["cosine_centred"], found["cosine_centred_error"] = self._centred()
        return found

    def scores(self) -> dict[str, Any]:
        """The training-free scores of the first encoder's layers, from the kept tokens."""
        tokens = torch.cat(self.kept, dim=1).float()
        scores = {"entropy": matrix_entropy, "dimension": intrinsic_dimension}
        found = {name: [score(x) for x in tokens] for name, score in scores.items()}
        return {"kept_tokens": tokens.shape[1], **found}

    def _cka(self, name: str, kind: str) -> np.ndarray:
        if f"weight_{name}" not in self.sums:
            return np.full((self.layers, self.layers), np.nan)
        weight = self.sums[f"weight_{name}"]
        energy = (self.sums[f"energy_{name}"] / weight).numpy()
        return alignment((self.sums[f"cka_{name}{kind}"] / weight).numpy(), energy)

    def _centred(self) -> tuple[np.ndarray, float]:
        """Mean cosine of the kept tokens without each layer's mean token, and the largest standard
        error, over pictures, of its entries."""
        mean = (self.sums["mean"] / self.done).float()[:, None]
        pairs, share = [], torch.zeros(2, len(mean))
        for tokens in self.kept:
            moved = tokens.float() - mean
            unit = F.normalize(moved, dim=-1).flatten(1)
            pairs.append(unit @ unit.T / tokens.shape[1])
            share += torch.stack([x.float().square().sum(dim=(1, 2)) for x in (moved, tokens)])
        table = torch.stack(pairs).double()
        found = table.mean(dim=0).numpy()
        constant = (share[0] <= 1e-10 * share[1]).numpy()
        found[constant], found[:, constant] = np.nan, np.nan
        if len(pairs) < 2:
            return found, float("nan")
        return found, float((table.std(dim=0) / len(pairs) ** 0.5).max())


def _resample(features: Features, grid: tuple[int, int]) -> tuple[Tensor, ...]:
    """Patch tokens of another grid, interpolated bilinearly (antialiased) to `grid`."""
    if features.grid == grid:
        return features.patches
    maps = [x.float().transpose(1, 2).unflatten(2, features.grid) for x in features.patches]
    resized = [F.interpolate(x, size=grid, mode="bilinear", antialias=True) for x in maps]
    return tuple(x.flatten(2).transpose(1, 2) for x in resized)


def grams(features: list[Tensor]) -> Tensor:
    """Linear Gram matrices (M, n, n) of M layers' features, each (n, width), in float32."""
    centred = (x.float() - x.float().mean(dim=0) for x in features)
    return torch.stack([x @ x.T for x in centred])


def hsic(kernels: Tensor, debiased: bool) -> Tensor:
    """HSIC between all pairs of M layers, (M, n, n) -> (M, M). Unbiased, it needs n >= 4."""
    n = kernels.shape[-1]
    if debiased:
        from cka.hsic import hsic_cross  # imports matplotlib, which takes a second

        return hsic_cross(kernels, kernels)
    rows = kernels.mean(dim=-1, keepdim=True)
    centred = kernels - rows - rows.mT + rows.mean(dim=-2, keepdim=True)
    return centred.flatten(1) @ centred.flatten(1).T / (n - 1) ** 2


def alignment(hsics: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """CKA (M, M) from accumulated HSICs; NaN where a layer does not vary over the examples.

    `energy` (M) is each layer's mean squared norm: what varies less than its rounding is constant.
    """
    own = np.diag(hsics)
    varies = own > 1e-20 * energy**2
    scale = np.sqrt(np.where(varies, own, np.nan))
    return hsics / np.outer(scale, scale)


def matrix_entropy(tokens: Tensor) -> float:
    """Von Neumann entropy of the tokens' normalised Gram matrix, in 0..1.

    With unit tokens Z (n, D) and the eigenvalues λ of Z Zᵀ / n: -Σ λ ln λ / ln min(n, D). 0: all
    tokens point one way, 1: all directions alike (Giraldo et al. 2014; Skean et al. 2025 compare
    layers by it, and VDE chooses a visual layer by it). NaN for tokens that are all zero.
    """
    unit = F.normalize(tokens.double(), dim=-1)
    n, width = unit.shape
    small = unit @ unit.T if n < width else unit.T @ unit
    values = torch.linalg.eigvalsh(small / n).clamp_min(0)
    if values.sum() == 0:
        return math.nan
    values = values / values.sum()
    return float(torch.special.entr(values).sum() / math.log(max(2, min(n, width))))


def intrinsic_dimension(tokens: Tensor) -> float:
    """TwoNN intrinsic dimension (Facco et al. 2017) by maximum likelihood: (n - 1) / Σ ln(r2 / r1).

    r1 and r2 are the distances of each token (n, D) to its two nearest others. Ansuini et al. 2019
    find that it rises and then falls with depth. Repeated tokens are left out; NaN with fewer than
    three different ones.
    """
    different = torch.unique(tokens.double(), dim=0)
    if len(different) < 3:
        return math.nan
    distances = torch.cdist(different, different)
    nearest = distances.topk(3, largest=False).values[:, 1:]
    ratios = (nearest[:, 1] / nearest[:, 0].clamp_min(1e-300)).log().sum()
    return float((len(different) - 1) / ratios) if ratios > 0 else math.nan
