"""Whitening: every direction of a layer's tokens with about the same variance.

    z = (h - mean) / std                                      per channel
    C = cov(z) = U diag(λ) Uᵀ
    W = U diag(λ + ρ · mean λ)^(-1/2) Uᵀ                      ρ is `shrinkage`
    y = s · W z                                               s: the mean variance of y is 1

Optimisers learn along the directions of large variance first. Where a layer keeps half its variance
in one direction, a short training sees little else: standardising channels does not change that,
since correlated channels make such a direction. Whitening that stays close to z is called ZCA
(Bell & Sejnowski 1997); shrinking towards the mean eigenvalue is Ledoit & Wolf's (2004) target,
with ρ chosen and not estimated. Directions with less than ρ times the mean variance are hardly
amplified, so that noise is not; ρ = 0 is exact whitening.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from layerfuse.errors import LayerfuseError

CONSTANT = 1e-12
"""A channel is constant if its variance is at most this share of its mean square: less is the
rounding of float32."""
SINGULAR = 1e-10
"""A direction has no variance if it has at most this share of the largest variance."""


@dataclass
class TokenMoments:
    """Mean and covariance of a stream of tokens, in float64.

    Attributes:
        count: number of tokens so far.
        mean: (D,)
        scatter: (D, D), the sum over tokens of the outer products of what differs from the mean.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> "TokenMoments":
        """The moments of some tokens.

        Args:
            tokens: (..., D), at least one token.
        """
        # Apple's GPUs have no float64.
        if tokens.device.type == "mps":
            tokens = tokens.cpu()
        # Sums of squares over many tokens need more digits than features have.
        precise = tokens.double().flatten(0, -2)
        mean = precise.mean(dim=0)
        centred = precise - mean
        return cls(len(precise), mean, centred.T @ centred)

    def joined(self, others: "TokenMoments") -> "TokenMoments":
        """The moments of both streams together (Chan et al. 1979)."""
        count = self.count + others.count
        apart = others.mean - self.mean
        mean = self.mean + apart * (others.count / count)
        # The distance of the two means is variance of all tokens too.
        between = torch.outer(apart, apart) * (self.count * others.count / count)
        return TokenMoments(count, mean, self.scatter + others.scatter + between)

    @property
    def variance(self) -> Tensor:
        """(D,) of each channel, without bias."""
        return self.scatter.diagonal() / (self.count - 1)

    @property
    def varying(self) -> Tensor:
        """(D,) booleans: the channels that are not constant."""
        variance = self.variance
        mean_square = self.mean.square() + variance
        return variance > CONSTANT * mean_square

    @property
    def inverse_std(self) -> Tensor:
        """(D,) what standardises each channel; 0 for constant ones, which say nothing."""
        return torch.where(self.varying, self.variance.rsqrt(), 0)

    @property
    def covariance(self) -> Tensor:
        """(D, D) of the tokens as they are, without bias."""
        return self.scatter / (self.count - 1)

    @property
    def standardized_covariance(self) -> Tensor:
        """(D, D) of the standardised tokens, C of the formula; zero at constant channels."""
        inverse_std = self.inverse_std
        return inverse_std[:, None] * self.covariance * inverse_std


def principal_directions(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """U and λ of a covariance U diag(λ) Uᵀ.

    Args:
        covariance: (D, D)

    Returns:
        The variances λ (D,), ascending and not negative, and the directions U (D, D) as columns.
    """
    # Any: torch does not type what `eigh` returns
    linalg: Any = torch.linalg
    variances, directions = linalg.eigh(covariance)
    # rounding makes some of the zeros negative
    return variances.clamp_min(0), directions


class Whiten(nn.Module):
    """y = s · W z with stored statistics; the identity until calibrated.

    All of it is one linear map of tokens without their mean, (x - mean) @ matrix. Both constants
    stay in float32 in a model of narrower numbers, and the product is made in float32: small
    directions are differences of large numbers.

    Args:
        width: channels of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # Buffers: saved and moved with the model, but never trained. With a dtype of their own,
        # which loading a model in bfloat16 keeps.
        self.mean = nn.Buffer(torch.zeros(width, dtype=torch.float32))
        self.matrix = nn.Buffer(torch.eye(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)"""
        dtype = torch.promote_types(x.dtype, torch.float32)
        centred = x.to(dtype) - self.mean.to(dtype)
        # Autocast would make the product in narrower numbers.
        with maybe_autocast(x.device.type, enabled=False):
            whitened = centred @ self.matrix.to(dtype)
        return whitened.to(x.dtype)

    @torch.no_grad()
    def measure(self, moments: TokenMoments, shrinkage: float) -> None:
        """Set the constants.

        Args:
            moments: of the layer's tokens. Channels that are constant in them become 0.
            shrinkage: ρ of the formula.

        Raises:
            LayerfuseError: if no channel varies, or a direction that does not vary would be
                amplified without limit because `shrinkage` is 0.
        """
        width = len(moments.mean)
        if moments.count < 2 or not moments.varying.any():
            raise LayerfuseError(
                f"none of its {width} channels varies over {moments.count} tokens of the training "
                "pictures, so that it cannot be whitened; leave the layer out, or give other "
                "pictures"
            )
        eigenvalues, directions = principal_directions(moments.standardized_covariance)
        shrunk = eigenvalues + shrinkage * eigenvalues.mean()
        smallest = SINGULAR * eigenvalues.max()
        if shrunk.min() <= smallest:
            rank = int((eigenvalues > smallest).sum())
            raise LayerfuseError(
                f"its {moments.count} tokens of the training pictures vary in {rank} of {width} "
                f"directions, and shrinkage {shrinkage:g} would amplify the others without limit; "
                "give a larger shrinkage, such as 1.0, or more pictures"
            )
        # W = U diag(...) Uᵀ
        whitening = (directions * shrunk.rsqrt()) @ directions.T
        # W z has the variance λ / (λ + ρ · mean λ) along each direction; the scalar s makes their
        # mean 1.
        variance = (eigenvalues / shrunk).mean()
        matrix = moments.inverse_std[:, None] * whitening * variance.rsqrt()
        # exactly, and not but for rounding
        matrix[:, ~moments.varying] = 0
        self.mean.copy_(moments.mean)
        self.matrix.copy_(matrix)
