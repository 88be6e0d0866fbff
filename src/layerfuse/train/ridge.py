"""Ridge regression from a stream of tokens, with an intercept, in closed form.

    min over W, b of Σ |y - (W x + b)|² + penalty · |W|²      over tokens x (H) with targets y (D)

    Sxx = Σ (x - mean x)(x - mean x)ᵀ, Sxy = Σ (x - mean x)(y - mean y)ᵀ
    Wᵀ = (Sxx + penalty · I)⁻¹ Sxy,   b = mean y - W mean x
    penalty = strength · mean eigenvalue of Sxx

(Hoerl & Kennard 1970.) The intercept is not penalised. Sums are all that is kept of the tokens. The
strength is the one with the smallest error on tokens that were held out: neighbouring tokens of a
picture are alike, so that leaving out single tokens, as generalised cross-validation does, would
choose too small a one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STRENGTHS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What is tried, as multiples of the mean eigenvalue of Sxx."""


@dataclass(frozen=True)
class RegressionSums:
    """What a regression needs to know of some tokens and their targets, in float64.

    Attributes:
        count: number of tokens.
        input_mean: (H,)
        target_mean: (D,)
        input_scatter: (H, H), Sxx of the formula.
        cross_scatter: (H, D), Sxy of the formula.
        target_scatter: the sum of |y - mean y|².
    """

    count: int
    input_mean: Tensor
    target_mean: Tensor
    input_scatter: Tensor
    cross_scatter: Tensor
    target_scatter: float

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> "RegressionSums":
        """The sums of some tokens.

        Args:
            inputs: (..., H), at least one token.
            targets: (..., D), one for each token.
        """
        # Sums of squares over many tokens need more digits than features have.
        x = _precise(inputs)
        y = _precise(targets)
        input_mean = x.mean(dim=0)
        target_mean = y.mean(dim=0)
        x = x - input_mean
        y = y - target_mean
        return cls(
            count=len(x),
            input_mean=input_mean,
            target_mean=target_mean,
            input_scatter=x.T @ x,
            cross_scatter=x.T @ y,
            target_scatter=float(y.square().sum()),
        )

    def joined(self, other: "RegressionSums") -> "RegressionSums":
        """The sums of these tokens and others.

        Args:
            other: of tokens that are not among these.
        """
        count = self.count + other.count
        input_shift = other.input_mean - self.input_mean
        target_shift = other.target_mean - self.target_mean
        # Centred anew: each part was centred on its own mean (Chan, Golub & LeVeque 1979).
        weight = self.count * other.count / count
        between_inputs = weight * torch.outer(input_shift, input_shift)
        between = weight * torch.outer(input_shift, target_shift)
        between_targets = weight * float(target_shift.square().sum())
        share = other.count / count
        return RegressionSums(
            count=count,
            input_mean=self.input_mean + share * input_shift,
            target_mean=self.target_mean + share * target_shift,
            input_scatter=self.input_scatter + other.input_scatter + between_inputs,
            cross_scatter=self.cross_scatter + other.cross_scatter + between,
            target_scatter=self.target_scatter + other.target_scatter + between_targets,
        )


def _precise(tokens: Tensor) -> Tensor:
    """(..., D) as (tokens, D) in float64."""
    # Apple's GPUs have no float64.
    if tokens.device.type == "mps":
        tokens = tokens.cpu()
    return tokens.detach().double().flatten(0, -2)


@dataclass(frozen=True)
class RidgeFit:
    """A fitted linear map y = W x + b.

    Attributes:
        weight: W (D, H).
        bias: b (D,).
        strength: what was chosen of `STRENGTHS`.
        r2: share of the targets' variance that was explained on the held-out tokens, by the map
            that was fitted without them; 1 is all of it.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    r2: float


def solve_ridge(sums: RegressionSums, strength: float) -> tuple[Tensor, Tensor]:
    """Fit tokens with one strength.

    Args:
        sums: of the tokens.
        strength: multiple of the mean eigenvalue of Sxx, above 0.

    Returns:
        W (D, H) and b (D,) of y = W x + b, in float64.
    """
    return _weights(sums, _Directions.of(sums), strength)


def fit_ridge(fitted: RegressionSums, held_out: RegressionSums) -> RidgeFit:
    """Choose the strength by held-out tokens, then fit all tokens with it.

    Args:
        fitted: sums of the tokens that every strength is tried on.
        held_out: sums of the tokens that choose the strength.

    Returns:
        The fit of both together.
    """
    directions = _Directions.of(fitted)
    chosen = STRENGTHS[0]
    smallest = float("inf")
    for strength in STRENGTHS:
        weight, bias = _weights(fitted, directions, strength)
        error = squared_error(held_out, weight, bias)
        if error < smallest:
            smallest = error
            chosen = strength
    weight, bias = solve_ridge(fitted.joined(held_out), chosen)
    # Targets that never change have nothing to explain.
    r2 = 0.0
    if held_out.target_scatter > 0:
        r2 = 1 - smallest / held_out.target_scatter
    return RidgeFit(weight, bias, chosen, r2)


def squared_error(sums: RegressionSums, weight: Tensor, bias: Tensor) -> float:
    """Σ |y - (W x + b)|² over tokens of which only the sums are known.

    Args:
        sums: of the tokens.
        weight: W (D, H).
        bias: b (D,).
    """
    # Around the means: |y|² - 2 yᵀW x + |W x|², and then what the means themselves are off.
    explained = float((weight.T * sums.cross_scatter).sum())
    written = float(((weight @ sums.input_scatter) * weight).sum())
    off = sums.target_mean - weight @ sums.input_mean - bias
    return sums.target_scatter - 2 * explained + written + sums.count * float(off.square().sum())


@dataclass(frozen=True)
class _Directions:
    """Sxx = U diag(eigenvalues) Uᵀ, and Sxy along its directions: found once for all strengths."""

    eigenvalues: Tensor
    basis: Tensor
    along: Tensor
    """Uᵀ Sxy (H, D)"""

    @classmethod
    def of(cls, sums: RegressionSums) -> "_Directions":
        # Any: torch does not type what `eigh` returns
        linalg: Any = torch.linalg
        eigenvalues, basis = linalg.eigh(sums.input_scatter)
        # Rounding makes some of the zeros negative.
        return cls(eigenvalues.clamp_min(0), basis, basis.T @ sums.cross_scatter)


def _weights(
    sums: RegressionSums, directions: _Directions, strength: float
) -> tuple[Tensor, Tensor]:
    """W and b with one strength."""
    penalty = strength * directions.eigenvalues.mean()
    # Inputs that never change have no directions: every weight is zero then.
    shrunk = (directions.eigenvalues + penalty).clamp_min(torch.finfo(torch.float64).tiny)
    weight = (directions.basis @ (directions.along / shrunk[:, None])).T
    return weight, sums.target_mean - weight @ sums.input_mean
