"""What is wrong with a recipe, its models or its data is named before any training."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from layerfuse.study.coordinate import study
from tests import tiny
from tests.studies import one_line, run_study, write_recipe, write_samples


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every training a failure of the test."""

    def fail(*args: Any, **settings: Any) -> None:
        pytest.fail("training started")

    monkeypatch.setattr("layerfuse.study.execute.train_arm", fail)


@pytest.mark.usefixtures("no_training")
def test_a_sentence_encoder_that_does_not_fit_is_known_before_training(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    # The LLM stands in for a sentence encoder: its embeddings have 32 numbers.
    fusion = {"name": "instruction_weighted", "sentence_encoder": str(tmp_path / "llm")}
    recipe["arms"] = [{"name": "guided", "layers": "1-2|3-4", "fusion": fusion}]

    with pytest.raises(ValueError, match=r"arm 'guided': .*has width 32, sentence_width is 768"):
        study(write_recipe(tmp_path, recipe), output=tmp_path / "study")

    assert not (tmp_path / "study").exists()


def no_damage(folder: Path) -> None:
    """Leave the files as they are: the recipe alone is wrong."""


def remove_data(folder: Path) -> None:
    (folder / "data.json").unlink()


def remove_picture(folder: Path) -> None:
    (folder / "3.png").unlink()


def write_text_for_picture(folder: Path) -> None:
    (folder / "3.png").write_text("text")


def remove_answer(folder: Path) -> None:
    question = {"from": "human", "value": "<image> n?"}
    sample = {"id": "mute", "image": "0.png", "conversations": [question]}
    write_samples(folder, [sample])


def remove_chat_template(folder: Path) -> None:
    tiny.tokenizer(chat_template=None).save_pretrained(folder / "llm")
    # Saving leaves alone the file of the tokenizer that was there before.
    (folder / "llm" / "chat_template.jinja").unlink(missing_ok=True)


def remove_llm(folder: Path) -> None:
    shutil.rmtree(folder / "llm")


@dataclass(frozen=True)
class BadInput:
    """A mistake of the user's and what the message about it must say."""

    message: str
    changes: dict[str, Any] = field(default_factory=dict)
    """entries of the recipe"""
    damage: Callable[[Path], None] = no_damage
    """of the files, in the folder that it is given"""


def arm_of(layer: int, strategy: str) -> list[dict[str, Any]]:
    """The arms of a recipe that has one."""
    return [{"layers": [layer], "fusion": {"name": strategy}}]


# Of an encoder of four blocks and the pictures 0.png to 7.png.
BAD_INPUTS = [
    BadInput("layer 9 does not exist", {"arms": arm_of(9, "single")}),
    BadInput("token_grid [4, 5] is larger than the 4 x 4 patches", {"token_grid": [4, 5]}),
    BadInput("unknown fusion strategy 'x'", {"arms": arm_of(1, "x")}),
    BadInput("encodr: unknown key; valid", {"encodr": 1}),
    BadInput("lacks the image token '<pic>'", {"image_token": "<pic>"}),
    BadInput("none.jinja", {"chat_template": "none.jinja"}),
    # The folder of the LLM, beside the recipe.
    BadInput("'llama' is not an encoder with patch tokens", {"encoder": "LLM"}),
    BadInput("no such file or folder of samples", damage=remove_data),
    BadInput("sample 3: no image file", damage=remove_picture),
    BadInput("cannot read the image", damage=write_text_for_picture),
    BadInput("sample mute: no answer to learn from", damage=remove_answer),
    BadInput("has no chat template", damage=remove_chat_template),
    BadInput("llm", damage=remove_llm),
    BadInput("valid: fsdp2, zero2, zero3", {"resources": {"processes": 2, "accelerate": "x"}}),
    BadInput("needs resources.processes of 2 or more", {"resources": {"accelerate": "fsdp2"}}),
    BadInput(
        "claim 'deeper' is about families ['reading'], of which the test asks nothing; valid",
        {
            "arms": [*arm_of(1, "single"), *arm_of(2, "single")],
            "baseline": "single 1",
            "claims": [
                {
                    "claim": "deeper",
                    "source": "nobody",
                    "better": ["single 2"],
                    "than": ["single 1"],
                    "families": ["reading"],
                    "limits": "made up",
                }
            ],
        },
    ),
    BadInput("not installed: trackio, which the recipe", {"report_to": ["trackio"]}),
    BadInput("not installed: liger_kernel, which", {"liger": True}),
]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("bad", BAD_INPUTS, ids=range(len(BAD_INPUTS)))
def test_bad_input_is_one_clear_error_before_training(
    bad: BadInput,
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    recipe.update(bad.changes)
    if recipe["encoder"] == "LLM":
        recipe["encoder"] = str(tmp_path / "llm")
    bad.damage(tmp_path)
    path = write_recipe(tmp_path, recipe)

    refused = run_study(path, tmp_path / "study")

    # 2 is a user's error; a bug's traceback would end with 1.
    assert refused.exit_code == 2, refused.output
    assert refused.output.count("error:") == 1
    assert bad.message in one_line(refused)
    assert not list(tmp_path.glob("study/arms/*"))
