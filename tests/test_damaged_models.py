"""A saved model with damaged files is one message of `eval` and `ask`, never a made-up model."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.load_answerer import load_answerer
from tests import tiny
from tests.studies import cut_in_half

JSON_FILES = [
    "config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


# Both are read by transformers too, which says nothing of it.
QUIET_FILES = ["chat_template.jinja", "generation_config.json"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a tiny model with its processor."""
    folder = tmp_path / "model"
    model = tiny.model("concat")
    model.save_pretrained(folder)
    tiny.processor(model).save_pretrained(folder)
    return folder


def test_a_whole_folder_is_loaded(saved: Path) -> None:
    answerer = load_answerer(saved)

    assert answerer.model.config.vision_layers


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00"])
def test_a_file_of_another_content(saved: Path, name: str, content: bytes) -> None:
    (saved / name).write_bytes(content)

    with pytest.raises(LayerfuseError, match="cannot read"):
        load_answerer(saved)


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors"])
def test_a_file_that_is_cut_off(saved: Path, name: str) -> None:
    cut_in_half(saved / name)

    with pytest.raises(LayerfuseError, match="cannot read"):
        load_answerer(saved)


def test_a_missing_tokenizer_is_named(saved: Path) -> None:
    """transformers would ask for packages of other tokenizers."""
    (saved / "tokenizer.json").unlink()

    with pytest.raises(LayerfuseError, match=r"it lacks tokenizer\.json"):
        load_answerer(saved)


def test_a_configuration_that_only_names_its_type(saved: Path) -> None:
    """transformers would fill in CLIP and Llama 7B, and draw their weights at random."""
    (saved / "config.json").write_text('{"model_type": "layerfuse"}')

    with pytest.raises(LayerfuseError, match="it lacks vision_config, text_config"):
        load_answerer(saved)


@pytest.mark.parametrize("key", ["vision_config", "text_config", "vision_groups", "fusion"])
def test_a_configuration_that_lacks_a_part(saved: Path, key: str) -> None:
    file = saved / "config.json"
    settings = json.loads(file.read_text())
    del settings[key]
    file.write_text(json.dumps(settings))

    with pytest.raises(LayerfuseError, match=f"it lacks {key}"):
        load_answerer(saved)


def test_a_weight_that_is_missing_is_not_made_up(saved: Path) -> None:
    """transformers would draw it at random and only say so."""
    file = saved / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if name.startswith("fusion."))
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(LayerfuseError, match=f"1 weights are missing, such as {name}"):
        load_answerer(saved)


@pytest.mark.parametrize("name", QUIET_FILES)
def test_a_file_that_transformers_would_do_without_is_named(saved: Path, name: str) -> None:
    cut_in_half(saved / name)

    with pytest.raises(LayerfuseError, match=rf"cannot read .*{name}.* Copy the model's folder"):
        load_answerer(saved)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", QUIET_FILES)
def test_such_a_file_of_another_content(saved: Path, name: str, content: bytes) -> None:
    (saved / name).write_bytes(content)

    with pytest.raises(LayerfuseError, match=f"cannot read .*{name}"):
        load_answerer(saved)


def test_they_are_named_to_those_who_load_with_transformers_alone(saved: Path) -> None:
    model: Any = AutoModelForImageTextToText
    processor: Any = AutoProcessor
    for name in QUIET_FILES:
        cut_in_half(saved / name)

    with pytest.raises(LayerfuseError, match=r"cannot read .*generation_config\.json"):
        model.from_pretrained(saved)
    with pytest.raises(LayerfuseError, match=r"cannot read .*chat_template\.jinja"):
        processor.from_pretrained(saved)
