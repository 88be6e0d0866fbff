"""Linear centred kernel alignment (CKA) from Gram matrices, accumulated over blocks of examples.

Kornblith et al. 2019 define CKA by HSIC; Song et al. 2012 (eq. 5) give the unbiased HSIC, and
Nguyen et al. 2021 average it over blocks, so that its expectation does not depend on their size
where examples are independent; tokens of one picture are not, and fewer pictures raise token CKA.
The biased HSIC (Gretton et al. 2005) grows towards 1 as a block has fewer examples than dimensions.
"""

import numpy as np
import torch
from torch import Tensor

MINIMUM = 4
"""Examples that the unbiased estimator needs."""


def grams(features: list[Tensor]) -> Tensor:
    """Linear Gram matrices (M, n, n) of M layers' features, each (n, width), in float32."""
    centred = [x.float() - x.float().mean(dim=0) for x in features]
    return torch.stack([x @ x.T for x in centred])


def hsic(kernels: Tensor, debiased: bool) -> Tensor:
    """HSIC between all pairs of M layers, (M, n, n) -> (M, M). Unbiased, it needs n >= 4."""
    n = kernels.shape[-1]
    if debiased:
        from cka.hsic import hsic_cross  # imports matplotlib, which takes a second

        return hsic_cross(kernels, kernels)
    rows = kernels.mean(dim=-1, keepdim=True)
    centred = kernels - rows - rows.mT + rows.mean(dim=-2, keepdim=True)
    flat = centred.flatten(1)
    return flat @ flat.T / (n - 1) ** 2


def alignment(hsics: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """CKA (M, M) from accumulated HSICs; NaN where a layer does not vary over the examples.

    `energy` (M) is each layer's mean squared norm: what varies less than its rounding is constant.
    """
    own = np.diag(hsics)
    varies = own > 1e-20 * energy**2
    scale = np.sqrt(np.where(varies, own, np.nan))
    return hsics / np.outer(scale, scale)
