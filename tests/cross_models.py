"""Models with `inject_cross` in two of their six LLM blocks, in every variant of the strategy."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layerfuse import FusionVLM
from layerfuse.fusion import Placed
from tests import tiny

BLOCKS = [1, 4]
"""the 0-based LLM blocks with cross-attention: neither the first nor the last"""
LENGTH = 60
"""tokens in each row of a prompt"""
WIDTH = 32
"""channels D of the LLM"""
MIXED_ROWS = [[5, 30], [], [44]]
"""the first tokens of the images: two in row 0, none in row 1, one in row 2; text around all"""

VARIANTS: dict[str, dict[str, Any]] = {
    "pre": {},
    "pre-mlp": {"mlp": True},
    "post": {"position": "post"},
    "post-mlp": {"position": "post", "mlp": True},
    "parallel": {"position": "parallel"},
    "released": {"released_residual": True},
    "released-mlp": {"released_residual": True, "mlp": True},
}
CLEAN_VARIANTS = [name for name in VARIANTS if "released" not in name]
"""those in which closed gates leave the LLM as it is"""


def variants_in_two_families() -> list[tuple[str, str]]:
    """(variant, LLM): in blocks with a norm before each branch, and with another one after it."""
    cases: list[tuple[str, str]] = []
    for variant in VARIANTS:
        cases.append((variant, "llama"))
    # the released residual is not defined for gemma's blocks
    for variant in CLEAN_VARIANTS:
        cases.append((variant, "gemma3"))
    return cases


each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_clean_variant = pytest.mark.parametrize("variant", CLEAN_VARIANTS)
in_two_families = pytest.mark.parametrize(("variant", "llm"), variants_in_two_families())


def cross_model(
    variant: str, llm: str = "llama", open_gates: bool = True, **options: Any
) -> FusionVLM:
    """A random model with a large addition in two blocks; norms are random as well.

    Args:
        variant: of `VARIANTS`.
        llm: of `tiny.LLMS`.
        open_gates: gates between 0.5 and 1.5 instead of zero.
        options: of the strategy and of `tiny.model`.
    """
    settings = {"placement": BLOCKS, **VARIANTS[variant], **options}
    model = tiny.model("inject_cross", llm=llm, open_gates=False, **settings)
    model.fusion.reset_parameters()
    with torch.no_grad():
        for name, parameter in model.fusion.named_parameters():
            if name.endswith(".gate") and open_gates:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim > 1:
                parameter.mul_(2)
        # Norms start as the identity: a norm that is left out or taken twice would not show.
        for name, parameter in model.named_parameters():
            if "norm" in name and "vision_tower" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def visual_of(model: FusionVLM, batch: dict[str, Tensor]) -> Placed:
    """What the fusion makes of the images of a batch, arranged by its rows."""
    visual = model(**batch).visual
    assert visual is not None
    return visual
