"""Whitening with shrinkage from its formula, in float64 numpy, by another way to W.

W = U diag(λ + ρ · mean λ)^(-1/2) Uᵀ is the inverse of the square root of C + ρ · mean λ · I, and
mean λ is the mean of C's diagonal: no eigenvectors are needed.
"""

from typing import Any

import numpy as np
from scipy.linalg import inv, sqrtm

from tests.naive_layers import Array


def whitening(tokens: Array, shrinkage: float) -> Array:
    """The whitened tokens (n, D) of tokens (n, D) that the constants are measured on.

    Every channel must vary.
    """
    z = (tokens - tokens.mean(axis=0)) / tokens.std(axis=0, ddof=1)
    covariance = np.cov(z, rowvar=False)
    width = len(covariance)
    shrunk = covariance + shrinkage * np.trace(covariance) / width * np.eye(width)
    # Any: scipy does not say that the root of a positive matrix is real
    root: Any = sqrtm(shrunk)
    whitened = z @ inv(root)
    # unit variance, channels taken together
    return whitened / np.sqrt(whitened.var(axis=0, ddof=1).mean())
