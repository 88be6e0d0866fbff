"""Which strategies the fit of a last Linear can judge, and what it changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layerfuse.fusion import FUSIONS, Fused, Fusion
from layerfuse.fusion.concat import Concat
from layerfuse.train.refit import LastLinear, why_not_fitted
from layerfuse.train.ridge import RidgeFit
from layerfuse.vision.features import Features
from tests import tiny

TOKENS = 16
"""Tokens of a tiny picture, in the encoder and in most strategies."""
JUDGED = ("single", "concat", "group_mean", "weighted_sum", "text_routed", "instruction_weighted")


def untrained(strategy: str, **options: Any) -> tuple[Fusion[Any], Features]:
    """A strategy as training begins, and the features of two pictures."""
    model = tiny.model(strategy, open_gates=False, **options)
    pixels = torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    with torch.no_grad():
        return model.fusion, model.encode_images(pixels)


class Doubled(Concat):
    """A user's strategy that changes what its projector writes."""

    def forward(self, features: Features, *args: Any, **options: Any) -> Fused:
        fused = super().forward(features, *args, **options)
        return Fused(2 * fused.tokens)


class Unprojected(Concat):
    """A user's strategy with a part of its own in the place of the projector."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.projector = torch.nn.Bilinear(1, 1, 32)

    def forward(self, features: Features, *args: Any, **options: Any) -> Fused:
        return Fused(features.patches[0].new_ones(len(features.patches[0]), TOKENS, 32))


def test_every_strategy_is_judged_or_has_a_reason() -> None:
    reasons = {}
    for name in FUSIONS:
        fusion, features = untrained(name)
        reasons[name] = why_not_fitted(fusion, features, TOKENS)

    for name in JUDGED:
        assert reasons.pop(name) is None, name
    assert set(reasons) == {"token_concat", "deformable", "inject_add", "inject_cross"}
    assert "makes" in str(reasons["token_concat"])
    assert "do not depend on layer" in str(reasons["deformable"])
    assert "inside the LLM" in str(reasons["inject_add"])
    assert "inside the LLM" in str(reasons["inject_cross"])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Doubled, "not what the last Linear"),
        (Unprojected, "no single projector"),
    ],
)
def test_strategies_of_users_that_no_fit_can_write(strategy: Any, message: str) -> None:
    concat, features = untrained("concat")

    reason = why_not_fitted(strategy(concat.config, concat.shapes), features, TOKENS)

    assert message in str(reason)


@pytest.mark.parametrize("projector", ["mlp", "linear"])
def test_what_was_fitted_is_what_the_strategy_writes(projector: str) -> None:
    """Whatever constant scale stands behind the Linear."""
    fusion, features = untrained("concat", projector=projector, token_scale=10)
    fusion.calibrate(features, embedding_std=0.02)
    last = LastLinear.of(fusion)
    assert last is not None
    inputs = last.watch(fusion, features).inputs.double()
    weight = torch.randn(32, inputs.shape[-1], dtype=torch.float64)
    bias = torch.randn(32, dtype=torch.float64)

    last.set(RidgeFit(weight, bias, strength=1.0, r2=1.0))

    written: Tensor = fusion(features).tokens
    torch.testing.assert_close(written.double(), inputs @ weight.T + bias, rtol=1e-4, atol=1e-4)
