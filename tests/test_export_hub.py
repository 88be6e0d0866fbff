"""`layerfuse export --to hub`: a folder that brings its own code."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import load_answerer
from layerfuse.export.equality import sample_picture
from layerfuse.export.flat_modules import Definition, flat_modules
from layerfuse.export.formats import export
from layerfuse.fusion import FUSIONS, register
from layerfuse.fusion.concat import Concat, ConcatConfig
from tests import tiny
from tests.studies import run_study, save_sentence_encoder, write_recipe

QUICK = ("deformable", "inject_cross", "instruction_weighted")
"""an external, an internal and a guided strategy; all others are tested with the slow ones"""
STRATEGIES: list[Any] = []
for name in FUSIONS:
    marks = [] if name in QUICK else [pytest.mark.slow]
    STRATEGIES.append(pytest.param(name, marks=marks))

ANSWER_ELSEWHERE = """
import json, sys
sys.modules["layerfuse"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.inputs([[{"role": "user", "content": "<image>What?"}]], [Image.open(picture)])
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(json.dumps({"tokens": tokens.tolist(), "pixels": float(inputs["pixel_values"].sum())}))
"""


def save(folder: Path, strategy: str) -> Path:
    """Save a tiny model of a strategy with its processor."""
    options: dict[str, Any] = {}
    if strategy == "instruction_weighted":
        save_sentence_encoder(folder / "sentences")
        options = {"sentence_encoder": str(folder / "sentences"), "sentence_width": 16}
    model = tiny.model(strategy, seed=11, **options)
    model.save_pretrained(folder / "model")
    tiny.processor(model).save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_process_without_layerfuse_answers_the_same(strategy: str, tmp_path: Path) -> None:
    """Inputs, logits (which `export` compares itself) and greedy answers."""
    model = save(tmp_path, strategy)
    picture = tmp_path / "picture.png"
    sample_picture().save(picture)

    exported = export(model, "hub")

    assert exported.difference == 0
    answerer = load_answerer(model)
    inputs = answerer.processor.inputs(
        [[{"role": "user", "content": "<image>What?"}]], [sample_picture()]
    )
    expected = answerer.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    finished = subprocess.run(
        [sys.executable, "-c", ANSWER_ELSEWHERE, str(exported.folder), str(picture)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert finished.returncode == 0, finished.stderr
    elsewhere = json.loads(finished.stdout.splitlines()[-1])
    assert elsewhere["tokens"] == expected.tolist()
    assert elsewhere["pixels"] == pytest.approx(float(inputs["pixel_values"].sum()))


def test_beside_an_installed_layerfuse_its_own_code_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And layerfuse's own classes stay those that are registered."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    model = save(tmp_path, "concat")
    exported = export(model, "hub")

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        exported.folder, trust_remote_code=True
    )
    again: Any = AutoModelForImageTextToText.from_pretrained(model)

    own = load_answerer(model).model
    assert type(again) is type(own)
    for name, value in own.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


@pytest.mark.parametrize("strategy", list(FUSIONS))
def test_the_code_is_flat_and_holds_that_strategy_alone(strategy: str) -> None:
    """No module imports layerfuse, and every module beside it that is imported is there."""
    module = FUSIONS[strategy][1]
    texts = flat_modules(
        [
            Definition("layerfuse.model.config", "FusionConfig"),
            Definition("layerfuse.model.vlm", "FusionVLM"),
            Definition("layerfuse.model.processor", "Processor"),
        ],
        registered=Definition(module.__module__, module.__name__),
    )

    registered: list[str] = []
    for text in texts.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert all(not alias.name.startswith("layerfuse") for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert not str(node.module).startswith("layerfuse")
                if node.level:
                    assert f"{node.module}.py" in texts
            if isinstance(node, ast.ClassDef):
                for decorator in node.decorator_list:
                    if isinstance(decorator, ast.Call) and "register" in ast.dump(decorator.func):
                        registered.append(node.name)
    # `single` is a concatenation of one
    expected = {module.__name__, *(["Concat"] if strategy == "single" else [])}
    assert set(registered) == expected
    assert "compose" not in texts["model_vlm.py"]


def test_a_models_own_kernel_of_settings_names_the_configuration_first(tmp_path: Path) -> None:
    """As transformers wants to know the class of a configuration before that of a model."""
    exported = export(save(tmp_path, "concat"), "hub")
    settings = json.loads((exported.folder / "config.json").read_text("utf-8"))

    assert list(settings["auto_map"]) == [
        "AutoConfig",
        "AutoModelForImageTextToText",
        "AutoProcessor",
    ]
    processor: Any = AutoProcessor
    assert processor.from_pretrained(exported.folder, trust_remote_code=True) is not None


def test_the_card_says_what_the_study_recorded(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Its recipe without folders of this machine, and its scores."""
    recipe["keep_models"] = "all"
    result = run_study(write_recipe(tmp_path, recipe), tmp_path / "study")
    assert result.exit_code == 0, result.output
    (model,) = tmp_path.glob("study/arms/two*/model")

    exported = export(model, "llava", tmp_path / "shipped")

    card = (exported.folder / "README.md").read_text("utf-8")
    record = json.loads((model.parent / "result.json").read_text("utf-8"))
    assert f"| all families | {record['scores']['mean']:.3f} |" in card
    assert "path: data.json" in card
    assert "Layers [1, 3]" in card
    assert str(tmp_path) not in card


@register("of_a_user", ConcatConfig)
class OfAUser(Concat):
    """A strategy outside of layerfuse."""


def test_strategies_of_users_are_refused(tmp_path: Path) -> None:
    """Their code is not layerfuse's to write."""
    model = save(tmp_path, "of_a_user")
    with pytest.raises(LayerfuseError, match="is no strategy of layerfuse"):
        export(model, "hub")
    assert not (tmp_path / "model-hub").exists()


def test_what_cannot_be_loaded_elsewhere_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is tried before it gets its name."""
    model = save(tmp_path, "concat")

    def broken(*arguments: Any, **options: Any) -> dict[str, str]:
        return {**flat_modules(*arguments, **options), "model_vlm.py": "raise OSError('no code')\n"}

    monkeypatch.setattr("layerfuse.export.hub.flat_modules", broken)
    with pytest.raises(LayerfuseError, match="no code"):
        export(model, "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_push_lists_what_would_go_to_the_hub(tmp_path: Path) -> None:
    """Without network or account."""
    exported = export(save(tmp_path, "concat"), "llava")
    result = CliRunner().invoke(app, ["push", str(exported.folder), "somebody/fused", "--dry-run"])

    assert result.exit_code == 0, result.output
    listed = [line.split("  ")[0] for line in result.output.splitlines()]
    present = sorted(path.name for path in exported.folder.iterdir())
    assert listed == [*present, "https://huggingface.co/somebody/fused"]


@pytest.mark.parametrize(
    ("folder", "repository", "reason"),
    [
        ("model", "somebody/fused", "lacks README.md"),
        ("nowhere", "somebody/fused", "lacks config.json, README.md"),
        ("model-llava", "fused", "write user/name"),
    ],
)
def test_what_cannot_be_pushed_is_refused(
    tmp_path: Path, folder: str, repository: str, reason: str
) -> None:
    """A folder that was not exported, a name that is none."""
    export(save(tmp_path, "concat"), "llava")
    result = CliRunner().invoke(app, ["push", str(tmp_path / folder), repository, "--dry-run"])

    assert result.exit_code == 2
    assert reason in " ".join(result.output.split())
