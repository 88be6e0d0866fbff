"""`image_aspect_ratio`: what becomes of pictures that are no squares, everywhere alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
)

from layerfuse.cost.recipe_table import show
from layerfuse.data.collate import image_tokens, visual_inputs
from layerfuse.data.feature_store import digests_of
from layerfuse.data.sample_sets import SampleSets
from layerfuse.data.sources import load
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.load_answerer import load_answerer
from layerfuse.model.pretrained import load_image_processor
from layerfuse.recipe.reader import load_recipe
from layerfuse.study.check import check_arms
from layerfuse.study.coordinate import study
from layerfuse.study.encode import encode_pictures, pictures_of
from layerfuse.train.arm import encoder_for, processor_for
from layerfuse.vision.picture import Picture
from tests import tiny

RECIPES = Path(__file__).parent.parent / "recipes"
RATIOS = ["pad", "square", "crop"]
SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
# Width and height: wide, tall, odd differences of the sides, smaller than SIDE, a square.
SHAPES = [(90, 40), (40, 90), (51, 32), (32, 51), (97, 20), (7, 24), (45, 45)]

Floats = NDArray[np.float64]


def own_image_processor(encoder: str) -> Any:
    """An image processor as published with an encoder of this kind, for pictures of SIDE pixels."""
    if encoder == "clip":
        return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    if encoder == "siglip":
        return SiglipImageProcessorPil(size=SQUARE)
    # DINOv2's enlarges the shorter side to 256 and cuts out 224.
    return BitImageProcessorPil(
        size={"shortest_edge": 40},
        crop_size=SQUARE,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


@pytest.fixture(params=["clip", "siglip", "dinov2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The folder of a saved image processor."""
    own_image_processor(request.param).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def noise(width: int, height: int) -> Image.Image:
    """A picture of which every pixel matters."""
    generator = np.random.default_rng(width * height)
    drawn = generator.integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(drawn)


def pixels_of(image_processor: Any, image: Image.Image) -> Floats:
    """(3, height, width): what an image processor makes of one picture."""
    (pixel_values,) = image_processor([image], return_tensors="pt")["pixel_values"]
    return pixel_values.double().numpy()


def expand2square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture on a square of one colour, as LLaVA-1.5's released code pads it."""
    width, height = image.size
    if width == height:
        return image
    longer = max(width, height)
    canvas = Image.new("RGB", (longer, longer), colour)
    if width > height:
        top = (width - height) // 2
        canvas.paste(image, (0, top))
    else:
        left = (height - width) // 2
        canvas.paste(image, (left, 0))
    return canvas


def naive(image: Image.Image, ratio: str, image_processor: Any) -> Floats:
    """(3, SIDE, SIDE): the picture made a square, resized and normalised, step by step."""
    if ratio == "pad":
        # Rounded down, as in the release.
        colour = tuple(int(mean * 255) for mean in image_processor.image_mean)
        image = expand2square(image, colour)
    if ratio == "crop":
        width, height = image.size
        shorter = min(width, height)
        # The longer side is rounded down.
        width = SIDE * width // shorter
        height = SIDE * height // shorter
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        # Of an odd rest, the smaller half is cut off on the left and at the top.
        left = (width - SIDE) // 2
        top = (height - SIDE) // 2
        right = left + SIDE
        bottom = top + SIDE
        image = image.crop((left, top, right, bottom))
    else:
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    shares = np.asarray(image).astype(np.float64) / 255
    mean = np.array(image_processor.image_mean)
    std = np.array(image_processor.image_std)
    normal = (shares - mean) / std
    return normal.transpose(2, 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_each_value_equals_its_steps_one_by_one(
    folder: str, ratio: Any, shape: tuple[int, int]
) -> None:
    own_processor = load_image_processor(folder)
    image = noise(*shape)

    pixels = pixels_of(load_image_processor(folder, ratio), image)

    expected = naive(image, ratio, own_processor)
    # Image processors compute in float32.
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_equals_the_image_processor_of_llava(folder: str, shape: tuple[int, int]) -> None:
    own_processor = load_image_processor(folder)
    of_llava = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": SIDE},
        crop_size=SQUARE,
        image_mean=own_processor.image_mean,
        image_std=own_processor.image_std,
    )
    image = noise(*shape)

    pixels = pixels_of(load_image_processor(folder, "pad"), image)

    # The same steps on the same settings: no rounding tells them apart.
    np.testing.assert_array_equal(pixels, pixels_of(of_llava, image))


def test_left_out_it_is_the_encoders_own_image_processor(folder: str) -> None:
    """The settings are part of the address of cached features, which must not move."""
    auto_image_processor: Any = AutoImageProcessor
    own_processor = auto_image_processor.from_pretrained(folder, backend="pil")

    image_processor = load_image_processor(folder)

    assert type(image_processor) is type(own_processor)
    assert image_processor.to_dict() == own_processor.to_dict()
    image = noise(51, 32)
    pixels = pixels_of(image_processor, image)
    np.testing.assert_array_equal(pixels, pixels_of(own_processor, image))


@pytest.mark.parametrize(("encoder", "ratio"), [("clip", "crop"), ("siglip", "square")])
def test_what_an_encoder_does_anyway_shares_its_cached_features(
    tmp_path: Path, encoder: str, ratio: Any
) -> None:
    own_image_processor(encoder).save_pretrained(tmp_path)

    image_processor = load_image_processor(str(tmp_path), ratio)

    assert image_processor.to_dict() == load_image_processor(str(tmp_path)).to_dict()


@pytest.mark.parametrize("ratio", RATIOS)
def test_saved_and_loaded_it_is_the_same(folder: str, ratio: Any, tmp_path: Path) -> None:
    image_processor = load_image_processor(folder, ratio)

    image_processor.save_pretrained(tmp_path / "saved")

    loaded = load_image_processor(str(tmp_path / "saved"))
    assert type(loaded) is type(image_processor)
    assert loaded.to_dict() == image_processor.to_dict()
    image = noise(51, 32)
    pixels = pixels_of(loaded, image)
    np.testing.assert_array_equal(pixels, pixels_of(image_processor, image))


def test_other_programs_know_the_saved_image_processor_as_llavas(
    folder: str, tmp_path: Path
) -> None:
    load_image_processor(folder, "pad").save_pretrained(tmp_path / "saved")

    text = (tmp_path / "saved" / "preprocessor_config.json").read_text()

    settings = json.loads(text)
    assert settings["image_processor_type"] == "LlavaImageProcessor"
    assert settings["do_pad"] is True


def test_an_image_processor_that_pads_can_be_given_another_value(tmp_path: Path) -> None:
    """Its class pads by a setting, which must not stay."""
    padding = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": SIDE}, crop_size=SQUARE)
    padding.save_pretrained(tmp_path)
    image = noise(51, 32)

    for ratio in ("square", "crop"):
        pixels = pixels_of(load_image_processor(str(tmp_path), ratio), image)

        np.testing.assert_allclose(pixels, naive(image, ratio, padding), atol=1e-6)


def with_own_image_processor(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """The file of a recipe whose encoder has DINOv2's settings, and whose pictures are wide."""
    own_image_processor("dinov2").save_pretrained(tmp_path / "encoder")
    # In the place of the fixture's pictures, each of another shape.
    for number in range(8):
        noise(60 + number, 40).save(tmp_path / f"{number}.png")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("ratio", RATIOS)
def test_cached_features_are_those_of_the_changed_pictures(
    recipe: dict[str, Any], tmp_path: Path, ratio: Any
) -> None:
    path = with_own_image_processor(recipe, tmp_path)
    checked = load_recipe(path, (f"image_aspect_ratio={ratio}",))
    test = load(checked.evaluate.data)
    samples = SampleSets({"align": test}, test)
    pictures = list(pictures_of([test]))
    digests = digests_of(pictures)

    store, _ = encode_pictures(checked, samples, digests)

    assert store is not None
    own_processor = load_image_processor(checked.encoder.model)
    changed = []
    for picture in pictures:
        pixels = naive(picture.open(), ratio, own_processor)
        changed.append(torch.tensor(pixels))
    pixel_values = torch.stack(changed).float()
    expected = encoder_for(checked)(pixel_values)
    cached = store.features(pictures)
    # The last batch of the cache can have another size, which changes the last bits.
    for layer, expected_layer in zip(cached.patches, expected.patches, strict=True):
        torch.testing.assert_close(layer, expected_layer, atol=1e-4, rtol=1e-4)


def test_values_do_not_share_cached_features(recipe: dict[str, Any], tmp_path: Path) -> None:
    """One picture under two values is two entries: their pixels are not the same."""
    path = with_own_image_processor(recipe, tmp_path)
    folders = set()
    for ratio in ("pad", "square", "crop", "null"):
        checked = load_recipe(path, (f"image_aspect_ratio={ratio}",))
        test = load(checked.evaluate.data)
        samples = SampleSets({"align": test}, test)
        digests = digests_of(pictures_of([test]))

        store, _ = encode_pictures(checked, samples, digests)

        assert store is not None
        folders.add(store.folders[3])
    assert len(folders) == 4


def record_backends(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The backends of all image processors that are loaded from now on, in their order."""
    backends: list[str | None] = []
    auto_image_processor: Any = AutoImageProcessor
    original = auto_image_processor.from_pretrained

    def recording(name: str, **options: Any) -> Any:
        backends.append(options.get("backend"))
        return original(name, **options)

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", recording)
    return backends


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_trained_model_is_asked_as_it_was_trained(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: Any
) -> None:
    """Through the folder of the saved model, with the answers of the test."""
    # One arm, since models of all arms are saved alike.
    recipe["arms"] = recipe["arms"][:1]
    path = with_own_image_processor(recipe, tmp_path)
    study(
        path,
        (f"image_aspect_ratio={ratio}",),
        output=tmp_path / "study",
        console=Console(quiet=True),
    )

    backends = record_backends(monkeypatch)

    (model,) = (tmp_path / "study").glob("arms/*/model")
    answerer = load_answerer(model)

    # In the version for PIL images, as in training, whatever else is installed.
    assert backends[-1] == "pil"
    trained_with = load_image_processor(recipe["encoder"], ratio)
    assert answerer.processor.image_processor.to_dict() == trained_with.to_dict()
    rows = (model.parent / "predictions.jsonl").read_text().splitlines()
    for row in map(json.loads, rows):
        # As the recipe's data have it: records leave the marker out.
        answer = answerer.ask([row["image"]], "<image> n?", max_new_tokens=2)
        assert answer == row["prediction"]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("side", [32, 48])
def test_show_counts_the_tokens_of_training(
    recipe: dict[str, Any], tmp_path: Path, ratio: Any, side: int
) -> None:
    """Also where the pictures are not of the size in the encoder's configuration (32)."""
    path = with_own_image_processor(recipe, tmp_path)
    # Its own pictures have no one size, of which `show` could know.
    many_sizes = BitImageProcessorPil(size={"shortest_edge": side}, do_center_crop=False)
    many_sizes.save_pretrained(tmp_path / "encoder")
    overrides = (f"image_aspect_ratio={ratio}",)
    checked = load_recipe(path, overrides)
    samples = list(load(checked.evaluate.data))

    _, arms = show(path, overrides, Console(quiet=True))

    first_config = check_arms(checked)[0]
    processor = processor_for(checked, first_config)
    batch = visual_inputs(processor, samples, None)
    trained_tokens = image_tokens(processor, batch)
    assert arms[0].visual_tokens == trained_tokens == (side // tiny.PATCH) ** 2


def test_an_unknown_value_is_refused_with_the_valid_ones(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = with_own_image_processor(recipe, tmp_path)

    with pytest.raises(LayerfuseError, match=r"image_aspect_ratio.*'pad', 'square' or 'crop'"):
        load_recipe(path, ("image_aspect_ratio=anyres",))

    # Any: in Python, nothing but a type checker knows the valid values.
    unknown: Any = "anyres"
    with pytest.raises(LayerfuseError, match="'anyres' is unknown; valid: pad, square, crop"):
        load_image_processor(recipe["encoder"], unknown)


# Image processors, and what is said of them.
NOT_CHANGED: dict[str, tuple[Any, str]] = {
    "steps of its own": (
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
        "ConvNextImageProcessorPil, has steps of its own",
    ),
    "rectangle": (
        BitImageProcessorPil(size={"height": 32, "width": 48}, do_center_crop=False),
        "name no square size .*'height': 32, 'width': 48",
    ),
    "no size": (
        CLIPImageProcessorPil(do_resize=False, do_center_crop=False),
        "name no square size .do_resize: False",
    ),
}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", NOT_CHANGED)
def test_image_processors_that_cannot_be_changed_are_named(
    tmp_path: Path, kind: str, ratio: Any
) -> None:
    image_processor, message = NOT_CHANGED[kind]
    image_processor.save_pretrained(tmp_path)

    with pytest.raises(LayerfuseError, match=f"{ratio} cannot be set for .*{message}"):
        load_image_processor(str(tmp_path), ratio)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "fusion-study-triple", "igva", "mmfuser"])
def test_published_studies_pad_as_llava_does(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")

    assert recipe.image_aspect_ratio == "pad"


def test_pictures_on_disk_are_padded_in_colour(tmp_path: Path) -> None:
    """Red, green and blue of the borders are not exchanged: the three means differ."""
    own_image_processor("dinov2").save_pretrained(tmp_path)
    Image.new("RGB", (64, 32), (255, 0, 0)).save(tmp_path / "red.png")
    image = Picture(str(tmp_path / "red.png")).open()

    pixels = pixels_of(load_image_processor(str(tmp_path), "pad"), image)

    own_processor = load_image_processor(str(tmp_path))
    for channel in range(3):
        mean = own_processor.image_mean[channel]
        std = own_processor.image_std[channel]
        # A whole number of 255 parts, which is not quite the mean.
        colour = int(mean * 255) / 255
        border = (colour - mean) / std
        assert pixels[channel, 0, 0] == pytest.approx(border, abs=1e-6)
