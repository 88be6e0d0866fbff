"""How the variance of a layer's tokens is spread over their directions.

Of the eigenvalues λ of the tokens' covariance, as they are and after each normalisation with
measured constants:

    effective rank   (Σ λ)² / Σ λ²        the participation ratio: as many directions of equal
                                          variance would have it
    first share      max λ / Σ λ          of the variance along the first direction
    condition        max λ / min λ        of the covariance

A short training learns along directions of large variance first, so that a layer of low effective
rank is read slowly, whatever it knows: see `layerfuse.fusion.whitening`.
"""

import numpy as np
from torch import Tensor

from layerfuse.fusion import StrategyConfig
from layerfuse.fusion.whitening import SINGULAR, TokenMoments, principal_directions
from layerfuse.look.similarity_report import LayerConditioning


def conditioning(tokens: Tensor) -> dict[str, LayerConditioning]:
    """Measure how the variance of every layer is spread.

    Args:
        tokens: (L, n, D), of L layers.

    Returns:
        By the value of a strategy's option `normalize`: `none`, `standardize`, and `whiten` with
        the shrinkage that is its default.
    """
    raw: list[Tensor] = []
    standardized: list[Tensor] = []
    whitened: list[Tensor] = []
    shrinkage = StrategyConfig().shrinkage
    for layer in tokens:
        moments = TokenMoments.of(layer)
        variances, _ = principal_directions(moments.covariance)
        # what is left of a constant layer without its mean is rounding
        raw.append(variances * moments.varying.any())
        variances, _ = principal_directions(moments.standardized_covariance)
        standardized.append(variances)
        # whitening leaves the directions as they are
        whitened.append(variances / (variances + shrinkage * variances.mean()))
    return {
        "none": spread_of(raw),
        "standardize": spread_of(standardized),
        "whiten": spread_of(whitened),
    }


def spread_of(variances: list[Tensor]) -> LayerConditioning:
    """Describe how variance is spread over directions.

    Args:
        variances: along the D directions of each of L layers, (D,).

    Returns:
        The three numbers of each layer; NaN for a layer without variance, and for the condition
        where a direction has none.
    """
    rank: list[float] = []
    first_share: list[float] = []
    condition: list[float] = []
    for of_layer in variances:
        total = of_layer.sum()
        # 0 / 0 is not a number, which is what a layer without variance has
        rank.append(float(total.square() / of_layer.square().sum()))
        first_share.append(float(of_layer.max() / total))
        smallest = float(of_layer.min() / of_layer.max())
        if smallest > SINGULAR:
            condition.append(1 / smallest)
        else:
            condition.append(np.nan)
    return LayerConditioning(
        effective_rank=np.array(rank),
        first_share=np.array(first_share),
        condition=np.array(condition),
    )
