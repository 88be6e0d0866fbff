"""Textbook formulas of how alike layers are, in float64 and written apart from the package.

A layer is a tensor (images, tokens, D) here.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

Array = np.ndarray

BLOCK_IMAGES = 64
"""Pictures of one CKA block."""
BLOCK_TOKENS = 512
"""Tokens that one block draws from its pictures."""


def naive_cosine(layers: Sequence[Tensor]) -> Array:
    """The cosine between the tokens of two layers, averaged over tokens: (L, L)."""
    unit_layers = []
    for layer in layers:
        tokens = layer.double()
        norms = tokens.norm(dim=-1, keepdim=True)
        unit_layers.append(tokens / norms)

    cosines = np.empty((len(layers), len(layers)))
    for i, first in enumerate(unit_layers):
        for j, second in enumerate(unit_layers):
            products = (first * second).sum(dim=-1)
            cosines[i, j] = products.mean()
    return cosines


def biased_hsic(x: Array, y: Array) -> float:
    """Gretton et al. 2005: tr(KHMH) / (n - 1)² of the examples x (n, D) and y (n, E)."""
    n = len(x)
    # H: what it multiplies loses its mean over the examples
    centring = np.eye(n) - 1 / n
    centred = centring @ x
    k = centred @ centred.T
    m = y @ y.T
    # The trace of a product of symmetric matrices is their inner product
    return (k * m).sum() / (n - 1) ** 2


def unbiased_hsic(x: Array, y: Array) -> float:
    """Song et al. 2012, eq. 5, of the examples x (n, D) and y (n, E)."""
    n = len(x)
    k = x @ x.T
    m = y @ y.T
    # The estimator leaves out each example's product with itself
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    trace = (k * m).sum()
    sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
    rows = k.sum(axis=0) @ m.sum(axis=0)
    total = trace + sums - 2 / (n - 2) * rows
    return total / (n * (n - 3))


def cka_blocks(layer: Tensor, name: str, seed: int) -> list[Array]:
    """The examples (n, D) of each block of 64 pictures: mean tokens, or drawn tokens."""
    pictures = layer.double().numpy()
    total, count, _ = pictures.shape
    drawn = BLOCK_TOKENS // min(total, BLOCK_IMAGES)
    examples = []
    for place, tokens in enumerate(pictures):
        if "images" in name:
            examples.append(tokens.mean(axis=0, keepdims=True))
        else:
            # What a picture gives depends on the seed and its place alone
            order = np.random.default_rng([seed, place]).permutation(count)
            examples.append(tokens[order[:drawn]])

    blocks = []
    for start in range(0, total, BLOCK_IMAGES):
        # The last block may be smaller
        of_block = examples[start : start + BLOCK_IMAGES]
        blocks.append(np.concatenate(of_block))
    return blocks


def average_hsic(
    first: list[Array],
    second: list[Array],
    pictures: int,
    biased: bool,
) -> float:
    """HSIC averaged over blocks, each of which counts by its number of pictures."""
    hsic = biased_hsic if biased else unbiased_hsic
    weighted = 0.0
    pictures_left = pictures
    for x, y in zip(first, second, strict=True):
        weight = min(BLOCK_IMAGES, pictures_left)
        pictures_left -= weight
        weighted += weight * hsic(x, y)
    return weighted / pictures


def naive_cka(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    name: str,
    seed: int = 0,
) -> Array:
    """CKA (L, M) of two lists of layers; `name` says of what and by which estimator."""
    pictures = len(first[0])
    biased = "biased" in name
    first_blocks = [cka_blocks(layer, name, seed) for layer in first]
    second_blocks = [cka_blocks(layer, name, seed) for layer in second]
    # The ratio is taken of averages: an average of ratios would depend on the block
    first_own = [average_hsic(x, x, pictures, biased) for x in first_blocks]
    second_own = [average_hsic(y, y, pictures, biased) for y in second_blocks]

    cka = np.empty((len(first), len(second)))
    for i, x in enumerate(first_blocks):
        for j, y in enumerate(second_blocks):
            between = average_hsic(x, y, pictures, biased)
            scale = (first_own[i] * second_own[j]) ** 0.5
            cka[i, j] = between / scale
    return cka
