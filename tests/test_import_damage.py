"""`layerfuse import` of files that are damaged or of other shapes: one error that names them."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.model.given_model import load_given
from layerfuse.released.importing import Elsewhere, import_checkpoint
from layerfuse.released.tensors import read_checkpoint
from tests import releases
from tests.releases import MLP_SETTINGS, Release
from tests.stock_folders import save_stock

PROJECTOR = "model.mm_projector"


def llava_release() -> Release:
    """A LLaVA of two blocks."""
    torch.manual_seed(1)
    settings = {**MLP_SETTINGS, "mm_vision_select_layer": -2}
    return Release(releases.encoder(), releases.llm(2), settings, releases.mlp(PROJECTOR))


def widen(file: Path, part: str) -> None:
    """Add a row to the first weight of a file whose name has this part."""
    weights: dict[str, Tensor] = safetensors.torch.load_file(file)
    name = next(name for name in weights if part in name)
    weights[name] = torch.cat([weights[name], weights[name][:1]])
    safetensors.torch.save_file(weights, file, {"format": "pt"})


def refusal(checkpoint: Path, folder: Path, **options: Any) -> str:
    """What importing says; nothing is written."""
    with pytest.raises(LayerfuseError) as raised:
        import_checkpoint(str(checkpoint), "llava-1.5", folder / "model", Elsewhere(**options))
    assert not (folder / "model").exists()
    return str(raised.value)


def test_an_encoder_of_another_shape(tmp_path: Path) -> None:
    checkpoint = llava_release().write(tmp_path)
    widen(tmp_path / "encoder" / "model.safetensors", "fc1.weight")

    message = refusal(checkpoint, tmp_path)

    assert "encoder holds no clip_vision_model as its configuration describes: 1 weights" in message
    assert "fc1.weight, which is [" in message


def test_an_llm_of_another_shape(tmp_path: Path) -> None:
    checkpoint = llava_release().write(tmp_path, whole=False)
    widen(tmp_path / "llm" / "model.safetensors", "up_proj.weight")

    message = refusal(checkpoint, tmp_path, base=str(tmp_path / "llm"))

    assert "llm holds no llama as its configuration describes: 1 weights" in message
    assert "up_proj.weight, which is [" in message


def test_a_tower_of_the_checkpoint_that_is_none_of_its_encoder(tmp_path: Path) -> None:
    """The error names the checkpoint."""
    given = llava_release()
    for name, tensor in given.tower.state_dict().items():
        given.added[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
    checkpoint = given.write(tmp_path)
    settings = json.loads((tmp_path / "encoder" / "config.json").read_text())
    settings["intermediate_size"] += 8
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(settings))

    message = refusal(checkpoint, tmp_path)

    assert f"{checkpoint} holds no clip_vision_model as its configuration describes" in message
    assert "by --encoder" in message
    folders = [word for word in message.split() if word.startswith("/")]
    assert all(word.startswith(str(tmp_path)) for word in folders)


def no_tensors(checkpoint: Path) -> None:
    torch.save({}, checkpoint / "mm_projector.bin")


def whole_numbers(checkpoint: Path) -> None:
    weights = torch.load(checkpoint / "mm_projector.bin")
    numbers = {name: (10 * weight).to(torch.int8) for name, weight in weights.items()}
    torch.save(numbers, checkpoint / "mm_projector.bin")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(no_tensors, "no tensor is in there"), (whole_numbers, "is in torch.int8")],
)
def test_a_projector_without_weights(
    spoil: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    checkpoint = llava_release().write(tmp_path, whole=False)
    spoil(checkpoint)

    message = refusal(checkpoint, tmp_path, base=str(tmp_path / "llm"))

    assert reason in message
    assert "mm_projector.bin" in message


def test_a_whole_model_without_tensors(tmp_path: Path) -> None:
    checkpoint = llava_release().write(tmp_path)
    for file in checkpoint.glob("model*"):
        file.unlink()
    safetensors.torch.save_file({}, checkpoint / "model.safetensors")

    assert "model.safetensors: no tensor is in there" in refusal(checkpoint, tmp_path)


def test_an_index_that_names_no_files(tmp_path: Path) -> None:
    checkpoint = llava_release().write(tmp_path)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": ["x"]}}')

    assert "index.json: 'a' is in ['x']; the name of a file" in refusal(checkpoint, tmp_path)


# torch warns of what such bytes say of their version
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("is_archive", [False, True])
def test_damaged_files_of_pytorch_are_read_or_refused(is_archive: bool, tmp_path: Path) -> None:
    """Cut off anywhere, or with another byte somewhere."""
    (tmp_path / "config.json").write_text("{}")
    content = io.BytesIO()
    tensors = {"a": torch.randn(8, 8), "b": torch.randn(8)}
    torch.save(tensors, content, _use_new_zipfile_serialization=is_archive)
    whole = content.getvalue()
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    drawn = random.Random(0)
    for _ in range(400):
        changed = bytearray(whole)
        changed[drawn.randrange(min(len(whole), 900))] = drawn.randrange(256)
        damaged.append(bytes(changed))
    refused = 0

    for written in damaged:
        (tmp_path / "mm_projector.bin").write_bytes(written)
        try:
            read_checkpoint(tmp_path)
        except LayerfuseError as error:
            assert "mm_projector.bin" in str(error)  # noqa: PT017 (many need not fail)
            refused += 1

    assert refused > len(damaged) // 4


def split(folder: Path, suffix: str) -> str:
    """Write the weights of a folder as two shards that share a tensor; its name."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    middle = len(names) // 2
    shards = [{name: weights[name] for name in part} for part in (names[:middle], names[middle:])]
    places: dict[str, str] = {}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    shared = names[0]
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        for name in shard:
            places[name] = file
        held = {shared: torch.full_like(weights[shared], 7.0), **shard}
        if suffix == "bin":
            torch.save(held, folder / file)
        else:
            safetensors.torch.save_file(held, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return shared


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_of_a_stock_model_that_share_a_tensor(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    save_stock(folder)
    shared = split(folder, suffix)

    with pytest.raises(LayerfuseError, match=f"-00002-of-00002.{suffix} both hold '{shared}'"):
        import_checkpoint(str(folder), "llava-hf", tmp_path / "model")


def test_a_model_in_both_formats_is_no_overlap(tmp_path: Path) -> None:
    """Many repositories hold both; transformers reads the one."""
    folder = tmp_path / "stock"
    save_stock(folder)
    torch.save({"lm_head.weight": torch.ones(2)}, folder / "pytorch_model.bin")

    assert load_given(str(folder), torch.float32).config.model_type == "llava"


def test_a_stock_model_of_another_shape(tmp_path: Path) -> None:
    save_stock(tmp_path / "stock")
    widen(tmp_path / "stock" / "model.safetensors", "linear_1.weight")

    with pytest.raises(LayerfuseError, match=r"holds no llava as .*linear_1.weight, which is \["):
        load_given(str(tmp_path / "stock"), torch.float32)
