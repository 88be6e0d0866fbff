"""Exported image encoders in llama.cpp itself: its visual tokens are those of the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipImageProcessorPil

from layerfuse import FusionVLM, Processor
from layerfuse.export.formats import export
from layerfuse.export.gguf_llava import FILE
from tests import tiny
from tests.llama_cpp import Array, visual_tokens, write_llm
from tests.test_export_gguf import FOLDING, image_processor

ROUNDED = 0.01
"""of the largest visual token: llama.cpp multiplies in half precision"""


def picture() -> Image.Image:
    """A square of the encoder's own size."""
    rows, columns = np.mgrid[: tiny.SIZE, : tiny.SIZE]
    colours = np.stack([7 * rows, 5 * columns, rows * columns], axis=-1) % 256
    return Image.fromarray(colours.astype(np.uint8))


def larger(model: FusionVLM) -> FusionVLM:
    """The model with an encoder whose blocks do much to their input."""
    for parameter in model.vision_tower.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model


def of_both(model: FusionVLM, image_processor: Any, folder: Path) -> tuple[Array, Array]:
    """The visual tokens of a picture: the model's, and llama.cpp's of what was exported."""
    processor = Processor(
        image_processor,
        tiny.tokenizer(),
        patch_size=tiny.PATCH,
        token_grid=None,
        fusion=model.config.fusion,
        layers=len(model.config.vision_layers),
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    exported = export(folder / "model", "gguf", class_token_first=True)
    pixels = image_processor([picture()], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.fuse(model.encode_images(pixels)).tokens[0].numpy()
    width = expected.shape[1]
    write_llm(folder / "llm.gguf", width)
    tokens = visual_tokens(exported.folder / FILE, folder / "llm.gguf", picture(), width)
    assert tokens.shape == expected.shape
    return expected, tokens


@pytest.mark.parametrize(("strategy", "layers", "options"), FOLDING)
def test_siglip_gives_the_tokens_of_the_model(
    strategy: str, layers: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = larger(tiny.model(strategy, encoder="siglip", layers=layers, **options))
    size = {"height": tiny.SIZE, "width": tiny.SIZE}

    expected, tokens = of_both(model, SiglipImageProcessorPil(size=size), tmp_path)

    assert np.abs(tokens - expected).max() < ROUNDED * np.abs(expected).max()
    # Layers in another order would be seen.
    assert np.abs(tokens[::-1] - expected).max() > 10 * ROUNDED * np.abs(expected).max()


def with_class_token_last(model: FusionVLM, pixels: Tensor) -> Array:
    """The visual tokens if the class token stands behind the patches, and the first is left out."""
    # Any: transformers' CLIP
    tower: Any = model.vision_tower.tower
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).mT
    hidden = torch.cat([patches, embeddings.class_embedding.expand(1, 1, -1)], dim=1)
    hidden = tower.pre_layrnorm(hidden + embeddings.position_embedding.weight)
    states = [hidden]
    for block in tower.encoder.layers:
        hidden = block(hidden, None)
        states.append(hidden)
    features = model.encode_images(pixels)
    read = tuple(states[layer][:, 1:] for layer in features.layers)
    return model.fuse(replace(features, patches=read)).tokens[0].numpy()


def test_a_class_token_is_still_put_behind_the_patches(tmp_path: Path) -> None:
    """Why `export` refuses CLIP: once llama.cpp is mended this fails, and it need not any more."""
    model = larger(tiny.model("concat", layers=[2, 3]))
    pixels = image_processor()([picture()], return_tensors="pt").pixel_values

    expected, tokens = of_both(model, image_processor(), tmp_path)

    largest = np.abs(expected).max()
    assert np.abs(tokens - expected).max() > 10 * ROUNDED * largest
    with torch.no_grad():
        assert np.abs(tokens - with_class_token_last(model, pixels)).max() < ROUNDED * largest
