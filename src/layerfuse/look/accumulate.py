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
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from layerfuse.errors import LayerfuseError
from layerfuse.look.conditioning import conditioning
from layerfuse.look.similarity_report import LayerConditioning, LayerScores, LayerSimilarity
from layerfuse.vision.features import Features

BLOCK_IMAGES = 64
"""Pictures of one CKA block; each gives its mean token as an example."""
BLOCK_TOKENS = 512
"""Tokens that a CKA block draws from its pictures."""
KEPT_IMAGES = 256
"""Pictures of the seeded sample whose tokens are kept.

They serve what needs the mean token first (the centred cosine), and the scores.
"""
KEPT_TOKENS = 2048
"""Tokens that are kept of that sample."""
MINIMUM = 4
"""Examples that the unbiased estimator needs."""
EXAMPLES = ("tokens", "images")
"""What CKA compares layers over."""
ESTIMATORS = {"": True, "_biased": False}
"""Suffix of a CKA's name, and whether its HSIC is the unbiased one."""


@dataclass
class _Block:
    """The examples of one encoder in the unfinished CKA block, one entry per picture."""

    tokens: list[Tensor] = field(default_factory=list)
    """Drawn tokens, each (L, t, D)."""
    means: list[Tensor] = field(default_factory=list)
    """Mean tokens, each (L, 1, D)."""

    def layers(self, examples: str) -> list[Tensor]:
        """The examples `tokens` or `images` of each layer, L times (n, D)."""
        pictures = self.means if examples == "images" else self.tokens
        return list(torch.cat(pictures, dim=1))


class LayerStatistics:
    """Sums over pictures for the layers of one encoder, and CKA with those of others.

    The first encoder gives the cosines, scores and norms; all give CKA. The first picture decides
    shapes.
    """

    def __init__(self, total: int, seed: int = 0) -> None:
        """Start with no pictures.

        Args:
            total: number of pictures that the pass will see.
            seed: draws the tokens; which of them depends on the picture's place only.
        """
        self.total = total
        self.seed = seed
        self.done = 0
        # Layers of all encoders together
        self.layers = 0
        self.sums: dict[str, Tensor] = {}
        # One block per encoder
        self.blocks: list[_Block] = []
        # One entry (L, t, D) per picture of the sample
        self.token_blocks: list[Tensor] = []
        order = np.random.default_rng(seed).permutation(total)
        self.sample = set(order[:KEPT_IMAGES].tolist())

    def add(self, encoders: Sequence[Features], names: Sequence[str]) -> None:
        """Add a batch of B pictures.

        Args:
            encoders: what each encoder says of the batch.
            names: of the B pictures, for messages.

        Raises:
            LayerfuseError: a picture gives infinite or undefined features; it is named.
        """
        # CKA over tokens pairs them by place, so all encoders need the grid of the first
        grid = encoders[0].grid
        patches_of_encoders = [_resample(features, grid) for features in encoders]
        self.layers = sum(map(len, patches_of_encoders))
        if not self.blocks:
            self.blocks = [_Block() for _ in encoders]

        for row, name in enumerate(names):
            for place, patches in enumerate(patches_of_encoders):
                of_picture = [layer[row] for layer in patches]
                layers = torch.stack(of_picture, dim=1)
                self._add_picture(place, layers, name)
            self.done += 1
            if len(self.blocks[0].means) == BLOCK_IMAGES:
                self._finish_block()

    def _add_picture(self, place: int, layers: Tensor, name: str) -> None:
        """Add one picture's tokens (N, L, D) in the encoder at `place`."""
        tokens = layers.float()
        # One reading of the tokens gives norms (the diagonal) and cosines: (N, L, L)
        products = tokens @ tokens.mT
        squares = products.diagonal(dim1=1, dim2=2)
        finite = squares.isfinite().all(dim=0)
        if not finite.all():
            layer = int((~finite).nonzero()[0])
            raise LayerfuseError(f"layer {layer} of {name} holds infinite or undefined features")

        # The draw depends on the picture's place alone, so that a resumed pass repeats it
        count = len(tokens)
        random = np.random.default_rng([self.seed, self.done])
        positions = random.permutation(count)
        drawn = min(count, BLOCK_TOKENS // min(self.total, BLOCK_IMAGES))
        mean = tokens.mean(dim=0)
        block = self.blocks[place]
        sample = layers[positions[:drawn]]
        block.tokens.append(sample.transpose(0, 1))
        block.means.append(mean[:, None])

        # Other encoders are there for CKA only
        if place > 0:
            return
        norms = squares.sqrt()
        # A token of zeros keeps cosine 0 instead of an undefined one
        scale = norms.clamp_min(1e-30).reciprocal()
        cosines = products * scale[:, :, None] * scale[:, None]
        self._sum("cosine", cosines.mean(dim=0))
        self._sum("mean", mean)
        self._sum("norm", norms.mean(dim=0))
        if self.done in self.sample:
            tokens_of_picture = min(count, KEPT_TOKENS // min(self.total, KEPT_IMAGES))
            sample = layers[positions[:tokens_of_picture]]
            self.token_blocks.append(sample.transpose(0, 1).cpu())

    def _sum(self, name: str, value: Tensor) -> None:
        """Add to a sum, in float64: rounding must not grow with the number of pictures."""
        addend = value.detach().cpu().double()
        if name in self.sums:
            self.sums[name] = self.sums[name] + addend
        else:
            self.sums[name] = addend

    def _finish_block(self) -> None:
        """Turn the block into HSICs, weighted by its number of pictures."""
        weight = len(self.blocks[0].means)
        for examples in EXAMPLES:
            layers: list[Tensor] = []
            for block in self.blocks:
                layers.extend(block.layers(examples))
            if len(layers[0]) < MINIMUM:
                continue
            kernels = grams(layers)
            for suffix, debiased in ESTIMATORS.items():
                hsics = hsic(kernels, debiased)
                self._sum(f"cka_{examples}{suffix}", weight * hsics)

            # The mean squared norm tells a constant layer from one that varies
            energies = []
            for layer in layers:
                squares = layer.float().square()
                energies.append(squares.sum(dim=1).mean())
            self._sum(f"energy_{examples}", weight * torch.stack(energies))
            self._sum(f"weight_{examples}", torch.tensor(weight))
        self.blocks = [_Block() for _ in self.blocks]

    def state(self) -> dict[str, Tensor]:
        """Give all that `restore` needs.

        Returns:
            Tensors by name, for a safetensors file.
        """
        state = {f"sums.{name}": value for name, value in self.sums.items()}
        state["done"] = torch.tensor(self.done)
        for place, block in enumerate(self.blocks):
            # A block that has just been finished holds nothing to stack
            if block.means:
                state[f"tokens.{place}"] = torch.stack(block.tokens).cpu()
                state[f"means.{place}"] = torch.stack(block.means).cpu()
        if self.token_blocks:
            state["kept"] = torch.stack(self.token_blocks)
        state["shape"] = torch.tensor([len(self.blocks), self.layers])
        return state

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from a saved state of the same pictures and seed.

        Args:
            state: what `state` gave.
            device: where the encoders run; the unfinished block goes there.
        """
        self.done = int(state["done"])
        self.token_blocks = list(state.get("kept", ()))
        self.sums = {}
        for name, value in state.items():
            if name.startswith("sums."):
                self.sums[name.removeprefix("sums.")] = value

        encoders, self.layers = state["shape"].tolist()
        self.blocks = [_Block() for _ in range(encoders)]
        for place, block in enumerate(self.blocks):
            if f"means.{place}" in state:
                tokens = state[f"tokens.{place}"].to(device)
                means = state[f"means.{place}"].to(device)
                block.tokens = list(tokens)
                block.means = list(means)

    def result(self) -> LayerSimilarity:
        """Compute the matrices from the sums; the unfinished block counts as it is.

        Returns:
            How alike the layers of the first encoder are, and those of the others.
        """
        # The last block may be smaller
        if self.blocks[0].means:
            self._finish_block()
        cosine = (self.sums["cosine"] / self.done).numpy()
        norm = (self.sums["norm"] / self.done).numpy()
        # A layer whose tokens are all zero has no direction
        zero = np.diag(cosine) == 0
        cosine[zero] = np.nan
        cosine[:, zero] = np.nan

        # The layers of the other encoders follow those of the first
        first = len(norm)
        among = {}
        across = {}
        for examples in EXAMPLES:
            for suffix in ESTIMATORS:
                whole = self._cka(examples, suffix)
                among[examples + suffix] = whole[:first, :first]
                across[examples + suffix] = whole[:first, first:]
        centred, error = self._centred_cosine()
        return LayerSimilarity(
            images=self.done,
            cosine=cosine,
            norm=norm,
            cka_tokens=among["tokens"],
            cross_tokens=across["tokens"],
            cka_tokens_biased=among["tokens_biased"],
            cross_tokens_biased=across["tokens_biased"],
            cka_images=among["images"],
            cross_images=across["images"],
            cka_images_biased=among["images_biased"],
            cross_images_biased=across["images_biased"],
            cosine_centred=centred,
            cosine_centred_error=error,
        )

    def scores(self) -> LayerScores:
        """Compute the training-free scores of the first encoder's layers from the kept tokens.

        Returns:
            What `matrix_entropy` and `intrinsic_dimension` say of each layer.
        """
        tokens = self._kept_tokens()
        return LayerScores(
            kept_tokens=tokens.shape[1],
            entropy=np.array([matrix_entropy(layer) for layer in tokens]),
            dimension=np.array([intrinsic_dimension(layer) for layer in tokens]),
        )

    def conditioning(self) -> dict[str, LayerConditioning]:
        """Compute how the variance of the first encoder's kept tokens is spread over directions.

        Returns:
            By the value of a strategy's option `normalize`.
        """
        return conditioning(self._kept_tokens())

    def _kept_tokens(self) -> Tensor:
        """(L, n, D): pictures do not matter, all kept tokens of a layer are one sample."""
        return torch.cat(self.token_blocks, dim=1).float()

    def _cka(self, examples: str, suffix: str) -> np.ndarray:
        """CKA between all layers of all encoders; NaN without a block that was large enough."""
        if f"weight_{examples}" not in self.sums:
            return np.full((self.layers, self.layers), np.nan)
        weight = self.sums[f"weight_{examples}"]
        hsics = (self.sums[f"cka_{examples}{suffix}"] / weight).numpy()
        energy = (self.sums[f"energy_{examples}"] / weight).numpy()
        return alignment(hsics, energy)

    def _centred_cosine(self) -> tuple[np.ndarray, float]:
        """Mean cosine of the kept tokens without each layer's mean token.

        Returns:
            The matrix (L, L), and the largest standard error, over pictures, of its entries.
        """
        mean = (self.sums["mean"] / self.done).float()[:, None]
        cosines = []
        energy = torch.zeros(len(mean))
        centred_energy = torch.zeros(len(mean))
        for block in self.token_blocks:
            tokens = block.float()
            centred = tokens - mean
            unit = F.normalize(centred, dim=-1).flatten(1)
            cosines.append(unit @ unit.T / tokens.shape[1])
            energy += tokens.square().sum(dim=(1, 2))
            centred_energy += centred.square().sum(dim=(1, 2))
        cosines_of_pictures = torch.stack(cosines).double()
        matrix = cosines_of_pictures.mean(dim=0).numpy()

        # What is left of a constant layer without its mean is rounding
        constant = (centred_energy <= 1e-10 * energy).numpy()
        matrix[constant] = np.nan
        matrix[:, constant] = np.nan

        pictures = len(cosines)
        if pictures < 2:
            return matrix, math.nan
        errors = cosines_of_pictures.std(dim=0) / pictures**0.5
        return matrix, float(errors.max())


def _resample(features: Features, grid: tuple[int, int]) -> Sequence[Tensor]:
    """Patch tokens of each layer, interpolated bilinearly (antialiased) to `grid`."""
    if features.grid == grid:
        return features.patches
    resampled = []
    for patches in features.patches:
        channels_first = patches.float().transpose(1, 2)
        maps = F.interpolate(
            channels_first.unflatten(2, features.grid),
            size=grid,
            mode="bilinear",
            antialias=True,
        )
        resampled.append(maps.flatten(2).transpose(1, 2))
    return resampled


def grams(features: list[Tensor]) -> Tensor:
    """Compute linear Gram matrices of centred features.

    Args:
        features: those of M layers, each (n, width) in any width.

    Returns:
        (M, n, n), in float32.
    """
    kernels = []
    for layer in features:
        examples = layer.float()
        centred = examples - examples.mean(dim=0)
        kernels.append(centred @ centred.T)
    return torch.stack(kernels)


def hsic(kernels: Tensor, debiased: bool) -> Tensor:
    """Compute HSIC between all pairs of M layers.

    Args:
        kernels: Gram matrices (M, n, n).
        debiased: the unbiased estimator, which needs n >= 4, instead of the biased one.

    Returns:
        (M, M).
    """
    if debiased:
        # It imports matplotlib, which takes a second
        from cka.hsic import hsic_cross

        return hsic_cross(kernels, kernels)
    count = kernels.shape[-1]
    rows = kernels.mean(dim=-1, keepdim=True)
    centred = kernels - rows - rows.mT + rows.mean(dim=-2, keepdim=True)
    # The trace of a product of symmetric matrices is their inner product
    flat = centred.flatten(1)
    return flat @ flat.T / (count - 1) ** 2


def alignment(hsics: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Compute CKA from accumulated HSICs.

    Args:
        hsics: HSIC between all pairs of M layers, (M, M).
        energy: each layer's mean squared norm, (M,).

    Returns:
        (M, M); NaN where a layer does not vary over the examples.
    """
    variation = np.diag(hsics)
    # What varies less than the rounding of its features is constant
    varies = variation > 1e-20 * energy**2
    defined = np.where(varies, variation, np.nan)
    scale = np.sqrt(defined)
    return hsics / np.outer(scale, scale)


def matrix_entropy(tokens: Tensor) -> float:
    """Compute the von Neumann entropy of the tokens' normalised Gram matrix.

    With unit tokens Z (n, D) and the eigenvalues λ of Z Zᵀ / n: -Σ λ ln λ / ln min(n, D). 0: all
    tokens point one way, 1: all directions alike (Giraldo et al. 2014; Skean et al. 2025 compare
    layers by it, and VDE chooses a visual layer by it).

    Args:
        tokens: (n, D).

    Returns:
        The entropy in 0..1; NaN for tokens that are all zero.
    """
    unit = F.normalize(tokens.double(), dim=-1)
    count, width = unit.shape
    # Z Zᵀ and Zᵀ Z share the eigenvalues that are not zero: take the smaller matrix
    gram = unit @ unit.T if count < width else unit.T @ unit
    eigenvalues = torch.linalg.eigvalsh(gram / count).clamp_min(0)
    if eigenvalues.sum() == 0:
        return math.nan
    shares = eigenvalues / eigenvalues.sum()
    # A single token or dimension has entropy 0: any positive divisor will do
    largest = math.log(max(2, min(count, width)))
    return float(torch.special.entr(shares).sum() / largest)


def intrinsic_dimension(tokens: Tensor) -> float:
    """Estimate the TwoNN intrinsic dimension (Facco et al. 2017) by maximum likelihood.

    (n - 1) / Σ ln(r2 / r1), where r1 and r2 are the distances of each token to its two nearest
    others. Ansuini et al. 2019 find that it rises and then falls with depth. Repeated tokens are
    left out.

    Args:
        tokens: (n, D).

    Returns:
        The dimension; NaN with fewer than three different tokens.
    """
    different = torch.unique(tokens.double(), dim=0)
    if len(different) < 3:
        return math.nan
    distances = torch.cdist(different, different)
    # The nearest of all is the token itself
    nearest = distances.topk(3, largest=False).values[:, 1:]
    ratios = nearest[:, 1] / nearest[:, 0].clamp_min(1e-300)
    total = ratios.log().sum()
    if total <= 0:
        return math.nan
    return float((len(different) - 1) / total)
