"""Refuse answers of a model that computes no numbers, which would be scored as answers."""

from torch import Tensor
from transformers import LogitsProcessor

from layerfuse.errors import LayerfuseError


def refuse_nan(values: Tensor) -> None:
    """Raise LayerfuseError for logits, or what was made of them, that are not numbers.

    Args:
        values: of any shape; minus infinity is a number, as that of tokens that cannot be said.
    """
    # A maximum is no number where any of the values is none.
    if values.numel() > 0 and values.amax().isnan():
        raise LayerfuseError(
            "the model's logits are not numbers (NaN): its weights are damaged or its training "
            "diverged, or its arithmetic overflows: --dtype float32 tells which"
        )


class NanRefused(LogitsProcessor):
    """Stops generation at logits that are not numbers: the likeliest token would be any."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_nan(scores)
        return scores
