"""`layerfuse export --to gguf`: llama.cpp would compute from the file what the model does."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil
from typer.testing import CliRunner

from layerfuse import FusionVLM, Processor
from layerfuse.errors import LayerfuseError
from layerfuse.export.formats import export
from layerfuse.export.gguf_llava import FILE, tokens_of_file
from layerfuse_cli.app import app
from tests import tiny

ROUNDED = 0.005
"""of the largest visual token: half precision, and the approximation of a GELU"""


def image_processor(side: int = tiny.SIZE) -> Any:
    """Of CLIP, with a mean and a deviation for each colour."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def saved(folder: Path, model: FusionVLM, side: int = tiny.SIZE) -> Path:
    """A model with its processor in a folder."""
    model.save_pretrained(folder / "model")
    processor = Processor(
        image_processor(side),
        tiny.tokenizer(),
        patch_size=tiny.PATCH,
        token_grid=model.config.token_grid,
        fusion=model.config.fusion,
        layers=len(model.config.vision_layers),
    )
    processor.save_pretrained(folder / "model")
    return folder / "model"


@torch.no_grad()
def check_tokens(model: FusionVLM, file: Path) -> None:
    """Compare on a picture that the export did not look at."""
    picture = Image.effect_noise((70, 50), 90).convert("RGB")
    pixels = image_processor()([picture], return_tensors="pt").pixel_values
    expected = model.fuse(model.vision_tower(pixels)).tokens[0].numpy()

    tokens = tokens_of_file(file, pixels[0].numpy())

    assert tokens.shape == expected.shape
    assert np.abs(tokens - expected).max() < ROUNDED * np.abs(expected).max()


FOLDING = [
    ("single", [3], {}),
    ("concat", [4, 1, 2], {}),
    ("concat", [0, 3], {}),
    ("group_mean", [[1, 2], [3, 4]], {"base": 3}),
    ("weighted_sum", [1, 2, 4], {"beside": "concat", "base": 3}),
    ("concat", [1, 3], {"normalize": "standardize"}),
]


@pytest.mark.parametrize(("strategy", "layers", "options"), FOLDING)
def test_the_file_gives_the_tokens_of_the_model(
    strategy: str, layers: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny.model(strategy, layers=layers, **options)
    if "normalize" in options:
        for norm in model.fusion.norms.values():  # type: ignore[union-attr]
            norm.mean.normal_()
            norm.std.uniform_(0.5, 2)

    exported = export(saved(tmp_path, model), "gguf", class_token_first=True)

    assert 0 < exported.difference < ROUNDED
    check_tokens(model, exported.folder / FILE)


def test_siglip_has_no_class_token_and_another_activation(tmp_path: Path) -> None:
    model = tiny.model("concat", encoder="siglip", layers=[2, 3])

    exported = export(saved(tmp_path, model), "gguf")

    check_tokens(model, exported.folder / FILE)
    fields = gguf.GGUFReader(str(exported.folder / FILE)).fields
    assert fields["clip.use_gelu"].contents() is True


def test_layers_are_written_once_and_ascending_without_what_lies_above(tmp_path: Path) -> None:
    model = tiny.model("concat", layers=[3, 1])

    exported = export(saved(tmp_path, model), "gguf", class_token_first=True)

    reader = gguf.GGUFReader(str(exported.folder / FILE))
    assert reader.fields["clip.vision.feature_layer"].contents() == [1, 3]
    assert reader.fields["clip.vision.block_count"].contents() == 3
    names = {tensor.name for tensor in reader.tensors}
    assert "v.blk.2.ffn_up.weight" in names
    assert not any(name.startswith(("v.blk.3", "v.post_ln")) for name in names)


def test_the_llm_is_a_folder_of_its_own(tmp_path: Path) -> None:
    model = tiny.model("concat")

    exported = export(saved(tmp_path, model), "gguf", class_token_first=True)

    auto_model: Any = AutoModelForCausalLM
    llm = auto_model.from_pretrained(exported.folder / "llm").eval()
    ids = torch.tensor([[5, 9, 40, 7]])
    with torch.no_grad():
        assert torch.equal(llm(ids).logits, model.language_model(ids).logits)
    tokenizer: Any = AutoTokenizer.from_pretrained(exported.folder / "llm")
    assert tokenizer.convert_tokens_to_ids("<image>") == tiny.IMAGE_ID


@pytest.mark.parametrize(
    ("strategy", "settings", "side", "message"),
    [
        ("concat", {"projector": "linear"}, 32, "puts a GELU behind it"),
        ("deformable", {}, 32, "cannot read this model"),
        ("concat", {"encoder": "dinov2"}, 32, "its encoder is a dinov2; valid: clip"),
        ("concat", {"token_grid": (2, 2)}, 32, "pools the patches"),
        ("concat", {}, 24, "pictures are 24 x 24 pixels"),
        ("single", {"layers": [0]}, 32, "the embeddings alone"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(
    strategy: str, settings: dict[str, Any], side: int, message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, tiny.model(strategy, **settings), side)

    with pytest.raises(LayerfuseError, match=message):
        export(folder, "gguf", class_token_first=True)

    assert not (tmp_path / "model-gguf").exists()


@pytest.mark.parametrize(
    "change", [{"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}]
)
def test_pictures_that_llama_cpp_would_make_otherwise_are_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """It divides by 255, and knows a mean and a deviation for each colour."""
    folder = saved(tmp_path, tiny.model("concat"))
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"].update(change)
    file.write_text(json.dumps(settings))

    with pytest.raises(LayerfuseError, match="its pictures are not"):
        export(folder, "gguf", class_token_first=True)

    assert not (tmp_path / "model-gguf").exists()


def test_what_was_written_wrongly_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read again before it is kept."""
    from layerfuse.export import gguf_llava

    monkeypatch.setitem(gguf_llava.BLOCK, "self_attn.q_proj", "attn_k")
    monkeypatch.setitem(gguf_llava.BLOCK, "self_attn.k_proj", "attn_q")
    model = tiny.model("concat")
    # A tiny encoder hardly attends: with larger weights a wrong name shows.
    for name, parameter in model.vision_tower.named_parameters():
        if "q_proj" in name:
            parameter.data.normal_(std=3)

    with pytest.raises(LayerfuseError, match="visual tokens that differ"):
        export(saved(tmp_path, model), "gguf", class_token_first=True)

    assert not (tmp_path / "model-gguf").exists()


def test_the_command_line_says_what_was_compared(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny.model("concat"))

    command = ["export", str(folder), "--to", "gguf", "--class-token-first"]
    ended = CliRunner().invoke(app, command)

    assert ended.exit_code == 0, ended.output
    said = " ".join(ended.stdout.split())
    assert "the largest difference of visual tokens, as a share of their largest" in said
    assert "was read and computed with numpy, as llama.cpp computes it" in said


def test_a_class_token_is_refused_unless_llama_cpp_puts_it_first(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny.model("concat"))

    with pytest.raises(LayerfuseError, match="class token of an encoder such as CLIP behind"):
        export(folder, "gguf")

    assert not (tmp_path / "model-gguf").exists()


def test_where_the_class_token_lies_is_a_question_of_gguf_alone(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="class_token_first is for gguf alone, not for llava"):
        export(tmp_path / "model", "llava", class_token_first=True)
