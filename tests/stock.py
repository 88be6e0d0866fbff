"""The LLM of a model as transformers alone sees it, and what it reads."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM

from layerfuse import FusionVLM
from tests import tiny


# Any: transformers does not annotate what its automatic classes make
def stock_llm(model: FusionVLM, folder: Path) -> Any:
    """The LLM of a model, saved and loaded by transformers alone."""
    model.language_model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def embeddings_with_images(model: FusionVLM, batch: dict[str, Tensor]) -> Tensor:
    """(rows, T, D): the embeddings of the text, with visual tokens at the image positions."""
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    visual_tokens = model.get_image_features(batch["pixel_values"]).pooler_output
    assert visual_tokens is not None
    is_image = batch["input_ids"] == tiny.IMAGE_ID
    embeddings[is_image] = visual_tokens.flatten(0, 1)
    return embeddings
