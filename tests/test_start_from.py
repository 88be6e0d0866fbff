"""`start_from` of a recipe: every arm begins as a model that somebody trained."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from layerfuse.errors import LayerfuseError
from layerfuse.model.given_parts import given_parts, read_given_projector
from layerfuse.model.given_template import given_template
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.train.arm import compose
from layerfuse_cli.app import app
from tests import tiny
from tests.stock_folders import TEMPLATE, save_stock, stock_processor
from tests.studies import one_line, run_study, write_recipe

QUESTION = "<image>\nWhat is it?"


@pytest.fixture
def started(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The recipe of two tiny arms, which start from a stock LLaVA of layer 3."""
    save_stock(tmp_path / "given")
    del recipe["encoder"], recipe["llm"]
    recipe["start_from"] = "./given"
    return recipe


def read(folder: Path, recipe: dict[str, Any]) -> Recipe:
    """The recipe with the parts of its given model."""
    loaded = load_recipe(write_recipe(folder, recipe))
    assert loaded.start_from is not None
    parts = given_parts(loaded.start_from, lambda text: None)
    return loaded.starting_from(**asdict(parts))


@torch.no_grad()
def test_every_arm_begins_as_the_given_model(started: dict[str, Any], tmp_path: Path) -> None:
    """The same picture and question through both processors and both models: no difference."""
    llava = save_stock(tmp_path / "given")
    processor = stock_processor()
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    logits = llava(**expected).logits
    resolved = read(tmp_path, started)

    for arm in resolved.all_arms():
        model, own = compose(resolved, arm, seed=0)
        inputs = own.inputs([[{"role": "user", "content": QUESTION}]], [picture])

        assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert float((model(**inputs).logits - logits).abs().max()) == 0.0


def test_a_study_trains_what_was_added(started: dict[str, Any], tmp_path: Path) -> None:
    """From a stock folder to a report, and again from what is kept; `show` knows it too."""
    data = tmp_path / "data.json"
    # the template writes a line of its own behind a picture
    data.write_text(data.read_text("utf-8").replace("<image> n?", "<image>\\nn?"), "utf-8")
    path = write_recipe(tmp_path, started)
    shown = CliRunner().invoke(app, ["show", str(path)])
    result = run_study(path, tmp_path / "study")
    again = run_study(path, tmp_path / "study")

    assert shown.exit_code == 0, shown.output
    assert "taking" in one_line(shown)
    assert result.exit_code == 0, result.output
    assert "taking" not in one_line(result)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "study" / "report.html").is_file()
    saved = load_recipe(tmp_path / "study" / "recipe.yaml")
    assert Path(saved.encoder.model).name == "encoder"


@torch.no_grad()
def test_llava_next_is_read_at_the_size_of_its_encoder(tmp_path: Path, home: Path) -> None:
    """Its first picture of several is the whole one, stretched."""
    save_stock(tmp_path / "given", next_generation=True)
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    tiles = stock_processor(next_generation=True).image_processor([picture], return_tensors="pt")

    parts = given_parts(str(tmp_path / "given"), lambda text: None)
    recipe = {"layers": [3], "fusion": {"name": "single"}}
    settings = {
        "name": "next",
        "start_from": str(tmp_path / "given"),
        "arms": [recipe],
        "stages": {"align": {"data": {"path": "x.json"}, "learning_rates": {"fusion": 1e-3}}},
        "evaluate": {"data": {"path": "x.json"}},
        "dtype": "float32",
    }
    settings["stages"]["align"].update({"batch_size": 1, "steps": 1})
    loaded = load_recipe(write_recipe(tmp_path, settings))
    resolved = loaded.starting_from(**asdict(parts))
    _, processor = compose(resolved, resolved.all_arms()[0], seed=0)
    inputs = processor.inputs([[{"role": "user", "content": QUESTION}]], [picture])

    torch.testing.assert_close(inputs["pixel_values"][0], tiles["pixel_values"][0, 0])


def test_parts_are_made_once_and_again_when_the_model_changes(tmp_path: Path, home: Path) -> None:
    """Which the times of its files say."""
    save_stock(tmp_path / "given")
    said: list[str] = []
    first = given_parts(str(tmp_path / "given"), said.append)
    second = given_parts(str(tmp_path / "given"), said.append)
    save_stock(tmp_path / "given")
    third = given_parts(str(tmp_path / "given"), said.append)

    assert first == second
    assert third.encoder != first.encoder
    assert len(said) == 2
    assert read_given_projector(first.encoder).layers == (3,)


def test_parts_that_were_left_half_written_are_made_again(tmp_path: Path, home: Path) -> None:
    """A folder gets its name when all of it is there."""
    save_stock(tmp_path / "given")
    (tmp_path / "given" / "processor_config.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "given" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(LayerfuseError, match="cannot read the processor"):
        given_parts(str(tmp_path / "given"), lambda text: None)

    written = [path.name for path in (home / "given").iterdir() if path.is_dir()]
    assert written == []


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"encoder": "dinov2-small"}, "encoder: dinov2-small and start_from"),
    ({"llm": "smollm2-135m-instruct"}, "llm: smollm2-135m-instruct and start_from"),
    ({"image_token": "</s>"}, "image_token: </s> and start_from"),
    ({"token_grid": [2, 2]}, "leave token_grid out"),
    ({"fusion_defaults": {"normalize": "whiten"}}, "leave out `normalize`"),
    ({"arms": [{"layers": [1, 2], "fusion": {"name": "concat"}}]}, r"does not put \[3\]"),
    ({"start_from": "./nowhere"}, "no such folder"),
    ({"start_from": "./home"}, "no multimodal model can be made"),
]


@pytest.mark.parametrize(("changes", "reason"), CONTRADICTIONS)
def test_what_contradicts_the_given_model_is_refused(
    started: dict[str, Any], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """Before anything trains."""
    (tmp_path / "home").mkdir()
    path = write_recipe(tmp_path, {**started, **changes})
    result = run_study(path, tmp_path / "study")

    assert result.exit_code == 2, result.output
    with pytest.raises(LayerfuseError, match=reason):
        raise LayerfuseError(one_line(result))


def test_a_model_of_closed_answers_needs_closed_answers(
    started: dict[str, Any], tmp_path: Path
) -> None:
    """Its softmax was never over all tokens: left open, it would say any of them."""
    trained = tiny.model("single", layers=[3])
    trained.close_answers([2, 7, 9, 50])
    trained.save_pretrained(tmp_path / "closed")
    tiny.processor(trained).save_pretrained(tmp_path / "closed")
    started["start_from"] = "./closed"
    path = write_recipe(tmp_path, started)

    refused = CliRunner().invoke(app, ["show", str(path)])
    shown = CliRunner().invoke(app, ["show", str(path), "closed_answers=true"])

    assert refused.exit_code == 2
    assert "was trained with closed answers" in one_line(refused)
    assert "set closed_answers: true" in one_line(refused)
    assert shown.exit_code == 0, shown.output


def test_cut_llms_are_refused(started: dict[str, Any], tmp_path: Path) -> None:
    """They would not be the given model."""
    path = write_recipe(tmp_path, started)
    result = CliRunner().invoke(app, ["show", str(path), "llm.blocks=2"])

    assert result.exit_code == 2
    assert "leave llm.blocks out" in one_line(result)


def test_the_recipe_of_the_page_is_valid(tmp_path: Path) -> None:
    """As far as it can be read without its data and without a hub."""
    page = (Path(__file__).parents[1] / "docs" / "ship.md").read_text("utf-8")
    text = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")

    assert recipe.encoder.model == recipe.llm.model == recipe.start_from
    assert recipe.baseline_name == "as given"


INLINE = TEMPLATE.replace("<image>\n", "<image>")
TEXTS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
LOSING = TEMPLATE.replace("part['text']", "part['text'].upper()")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, "USER: <image>\nWhat is it? ASSISTANT:"),
        (INLINE, "USER: <image>\nWhat is it? ASSISTANT:"),
        (TEXTS, "user: <image>\nWhat is it?</s>assistant:"),
    ],
)
def test_templates_of_parts_become_templates_of_texts(template: str, expected: str) -> None:
    """Whether or not they write a line of their own behind a picture."""
    processor = stock_processor(template)
    processor.chat_template = given_template(processor)
    own = tiny.processor(tiny.model("single"), chat_template=processor.chat_template)

    written = own.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )

    assert written == expected


@pytest.mark.parametrize("template", [LOSING, "{{ 1 / 0 }}", None])
def test_templates_that_change_what_people_say_are_left_out(template: str | None) -> None:
    """Whoever starts from such a model gives `chat_template`."""
    assert given_template(stock_processor(template)) is None


def test_the_first_token_that_a_stock_tokenizer_adds_is_written_by_the_template() -> None:
    """As in released checkpoints of LLaVA-1.5."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    template = given_template(stock_processor(tokenizer=tokenizer))
    own = tiny.processor(tiny.model("single"), chat_template=template)

    inputs = own.inputs([[{"role": "user", "content": "a"}]])

    assert inputs["input_ids"][0, :2].tolist() == [1, *own.tokenizer("U").input_ids]


def test_another_image_token_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    """Its pictures would stand at other places than the model reads them at."""
    folder = tmp_path / "given"
    save_stock(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["image_token_index"] = 9
    (folder / "config.json").write_text(json.dumps(settings))

    with pytest.raises(LayerfuseError, match=r"image_token_index of .* is 9, .* set both to"):
        given_parts(str(folder), lambda text: None)


def test_overlapping_files_of_a_given_model_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    save_stock(folder)
    (folder / "model-extra.safetensors").write_bytes((folder / "model.safetensors").read_bytes())

    with pytest.raises(LayerfuseError, match="the shards overlap"):
        given_parts(str(folder), lambda text: None)
