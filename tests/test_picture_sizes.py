"""Image processors that make pictures of several sizes, or more than pixels, are refused early."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
)

from layerfuse.cost.recipe_table import show
from layerfuse.errors import LayerfuseError
from layerfuse.look.probe import probe
from layerfuse.look.similarity import similarity
from layerfuse.model.pretrained import load_image_processor, processed_size
from layerfuse.study.coordinate import study, train
from tests import tiny

SQUARE = {"height": tiny.SIZE, "width": tiny.SIZE}


def quiet() -> Console:
    """A console that prints nothing."""
    return Console(quiet=True)


def without_centre_crop() -> Any:
    """An image processor that keeps the ratio of the sides."""
    return BitImageProcessorPil(
        size={"shortest_edge": tiny.SIZE},
        do_center_crop=False,
    )


@pytest.fixture
def path(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """The file of a recipe whose image processor makes several sizes, and whose pictures do not.

    All its pictures have one shape: that training would go well is no excuse, the next picture
    that the model is asked about can have another.
    """
    without_centre_crop().save_pretrained(tmp_path / "encoder")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


# Both what is wrong and each setting that mends it.
SEVERAL_SIZES = (
    r"several sizes: 32 x 64 pixels .* 106 x 32 .*do_center_crop: False.*"
    r"`image_aspect_ratio` to pad, square or crop .*do_center_crop and crop_size"
)


def test_a_study_is_refused_before_it_writes_anything(path: Path, tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match=SEVERAL_SIZES):
        study(path, output=tmp_path / "study", console=quiet())

    assert not list(tmp_path.glob("study/arms/*"))


def test_train_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match=SEVERAL_SIZES):
        train(path, arm="one", output=tmp_path / "model")

    assert not list(tmp_path.glob("model/**/*.safetensors"))


def test_show_is_refused(path: Path) -> None:
    """A number of tokens for all pictures would be wrong."""
    with pytest.raises(LayerfuseError, match=SEVERAL_SIZES):
        show(path, console=quiet())


def test_show_refuses_rectangles(path: Path) -> None:
    """It would count the tokens of squares."""
    rectangle = BitImageProcessorPil(size={"height": 32, "width": 48}, do_center_crop=False)
    rectangle.save_pretrained(path.parent / "encoder")

    with pytest.raises(LayerfuseError, match="makes pictures of 32 x 48 pixels"):
        show(path, console=quiet())


@pytest.mark.usefixtures("path")
def test_similarity_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "look"

    with pytest.raises(LayerfuseError, match=SEVERAL_SIZES):
        similarity(
            str(tmp_path / "encoder"),
            images=str(tmp_path),
            output=output,
            console=quiet(),
        )

    assert not output.exists()


def test_probe_is_refused(path: Path, tmp_path: Path) -> None:
    records = []
    # Enough pictures of both answers to make a task of the question.
    for number in range(40):
        name = f"{number}.png"
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        question = {"from": "human", "value": "<image> n?"}
        answer = {"from": "gpt", "value": str(number % 2)}
        records.append({"id": name, "image": name, "conversations": [question, answer]})
    (tmp_path / "task.json").write_text(json.dumps(records))
    output = tmp_path / "look"

    with pytest.raises(LayerfuseError, match=SEVERAL_SIZES):
        probe(
            str(path.parent / "encoder"),
            data=str(tmp_path / "task.json"),
            output=output,
            console=quiet(),
        )

    assert not output.exists()


@pytest.mark.parametrize("ratio", ["pad", "square", "crop"])
def test_each_value_of_image_aspect_ratio_mends_it(path: Path, ratio: Any) -> None:
    encoder = str(path.parent / "encoder")

    image_processor = load_image_processor(encoder, ratio)

    assert processed_size(encoder, image_processor) == (tiny.SIZE, tiny.SIZE)


ONE_SIZE: dict[str, tuple[Any, tuple[int, int]]] = {
    "centre crop": (
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE),
        (tiny.SIZE, tiny.SIZE),
    ),
    "both sides": (
        SiglipImageProcessorPil(size=SQUARE),
        (tiny.SIZE, tiny.SIZE),
    ),
    "rectangle": (
        BitImageProcessorPil(size={"height": 32, "width": 48}, do_center_crop=False),
        (32, 48),
    ),
    # Rows of patches of any shape, which are taken as squares of as many patches.
    "SigLIP 2": (Siglip2ImageProcessorPil(patch_size=16, max_num_patches=64), (128, 128)),
    # Padded with black where the picture is smaller.
    "centre without resizing": (
        CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE),
        (tiny.SIZE, tiny.SIZE),
    ),
}


@pytest.mark.parametrize("kind", ONE_SIZE)
def test_image_processors_of_one_size_are_taken(tmp_path: Path, kind: str) -> None:
    image_processor, expected_size = ONE_SIZE[kind]
    image_processor.save_pretrained(tmp_path)

    loaded = load_image_processor(str(tmp_path))

    assert processed_size("encoder", loaded) == expected_size
    # Of any picture, not only of those that it was tried with.
    for shape in [(300, 200), (200, 300), (31, 33)]:
        pixels = loaded([Image.new("RGB", shape)], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, *expected_size)


def test_pictures_that_are_not_resized_have_several_sizes(tmp_path: Path) -> None:
    as_they_come = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    as_they_come.save_pretrained(tmp_path)

    with pytest.raises(LayerfuseError, match=r"several sizes: .* do_resize: False"):
        load_image_processor(str(tmp_path))


MORE_THAN_PIXELS: dict[str, tuple[Any, str]] = {
    # Tiles of every picture.
    "LLaVA-NeXT": (LlavaNextImageProcessorPil(), r"pixel_values \(1 x \d+ x 3 .*image_sizes"),
    # Rows of patches instead of a picture.
    "Qwen2-VL": (Qwen2VLImageProcessorPil(), r"pixel_values \(\d+ x 1176\), image_grid_thw"),
    # Pictures as such, but each with a size of its own.
    "Pixtral": (PixtralImageProcessorPil(), "image_sizes"),
}


@pytest.mark.parametrize("kind", MORE_THAN_PIXELS)
def test_what_is_more_than_pixels_is_refused_by_its_names(tmp_path: Path, kind: str) -> None:
    image_processor, message = MORE_THAN_PIXELS[kind]
    image_processor.save_pretrained(tmp_path)
    name = type(image_processor).__name__

    with pytest.raises(LayerfuseError, match=f"{name}, makes .*{message}.* of one picture"):
        load_image_processor(str(tmp_path))


def test_a_folder_without_an_image_processor_is_named(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Nothing"}')

    with pytest.raises(LayerfuseError, match=f"cannot read the image processor of {tmp_path}"):
        load_image_processor(str(tmp_path))
