"""Whether an exported model is the trained one: the same inputs, the same logits."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM

QUESTIONS = ("What is in the picture?", "\nName its colour.")
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
"""of logits, by the model's dtype"""
NARROW_TOLERANCE = 0.05
"""of logits in half precision, as a share of their largest: a folded weight is rounded once more"""


def sample_picture() -> Image.Image:
    """A picture of noise that is no square, the same each time."""
    pixels = np.random.default_rng(0).integers(0, 256, (180, 240, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Any: the exported model and its processor are of other classes than layerfuse's
@torch.no_grad()
def check_equal(model: FusionVLM, processor: Processor, stock: Any, stock_processor: Any) -> float:
    """Ask both models the same about a picture.

    Args:
        model: the trained model.
        processor: its processor.
        stock: the exported model.
        stock_processor: its processor.

    Returns:
        The largest difference of two logits.

    Raises:
        LayerfuseError: inputs differ, or logits by more than rounding.
    """
    picture = sample_picture()
    largest = 0.0
    for question in QUESTIONS:
        inputs = processor.inputs(
            [[{"role": "user", "content": IMAGE_TOKEN + question}]],
            [picture],
        )
        stock_inputs = stock_processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": picture},
                        {"type": "text", "text": question},
                    ],
                }
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for name in ("input_ids", "attention_mask", "pixel_values"):
            _refuse_other_input(name, inputs[name], stock_inputs[name])

        pixels = inputs["pixel_values"].to(model.dtype)
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        expected = model(**tokens, pixel_values=pixels).logits
        logits = stock(**tokens, pixel_values=pixels).logits
        largest = max(largest, _difference(model, expected, logits))
    return largest


def _refuse_other_input(name: str, expected: Tensor, given: Tensor) -> None:
    """Raise LayerfuseError if a model input is another one in the exported folder."""
    if expected.shape == given.shape and torch.equal(expected, given):
        return
    raise LayerfuseError(
        f"the exported processor makes other {name} than this model was trained with "
        f"({list(given.shape)} against {list(expected.shape)}): its tokenizer or image processor "
        "does something that stock LLaVA does not. Nothing was written"
    )


def _difference(model: FusionVLM, expected: Tensor, logits: Tensor) -> float:
    """The largest difference of logits.

    Raises:
        LayerfuseError: it is more than rounding.
    """
    closed = model.answer_head
    if closed is not None:
        # those of tokens that no answer is made of are suppressed in generation alone
        rows = torch.tensor(closed.tokens)
        expected = expected[..., rows]
        logits = logits[..., rows]
    difference = float((expected - logits).abs().max())
    tolerance = TOLERANCES.get(model.dtype)
    if tolerance is None:
        tolerance = NARROW_TOLERANCE * float(expected.abs().max())
    if difference > tolerance:
        raise LayerfuseError(
            f"the exported model's logits differ by {difference:.2g} (tolerance {tolerance:.2g}): "
            f"stock LLaVA lacks something that this LLM ({model.config.text_config.model_type}) "
            "does, such as scaled or capped logits. Nothing was written; `--to hub` exports it as "
            "it is"
        )
    return difference
