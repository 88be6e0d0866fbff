"""Training-free scores of a layer, from a sample of its patch tokens.

Neither needs labels. Whether they predict what a layer is worth in training is an empirical
question: see the results page of the selection study.
"""

import math

import torch
from torch import Tensor


def matrix_entropy(tokens: Tensor) -> float:
    """Von Neumann entropy of the tokens' normalised Gram matrix, in 0..1.

    With unit tokens Z (n, D) and the eigenvalues λ of Z Zᵀ / n: -Σ λ ln λ / ln min(n, D). 0: all
    tokens point one way, 1: all directions alike (Giraldo et al. 2014; Skean et al. 2025 compare
    layers by it, and VDE chooses a visual layer by it). NaN for tokens that are all zero.
    """
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
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
