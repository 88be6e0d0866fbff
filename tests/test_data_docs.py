"""What docs/data.md shows is true: its messages are those of the code, its examples are read."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

from layerfuse.data.feature_store import digests_of
from layerfuse.data.sources import faults, load
from layerfuse.errors import LayerfuseError
from layerfuse.model.pretrained import load_image_processor
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.study.check import load_checked
from layerfuse.study.coordinate import study
from layerfuse.study.data_summary import print_data_summary, summarize_data
from layerfuse.study.encode import pictures_of
from layerfuse.vision.picture import Picture
from tests.studies import write_recipe, write_samples
from tests.test_docs import README, ROOT, snippets
from tests.wrong_data import (
    ANSWER,
    BAD_IMAGE_PROCESSORS,
    BAD_PICTURES,
    BAD_RECORDS,
    BAD_SOURCES,
    TURNS,
    good,
    message_of,
)

PAGE = ROOT / "docs" / "data.md"
AND_SO_ON = " ..."
"""ends a message of which the page shows the beginning"""
BAD_SAMPLES = re.compile(r"; \d+ of \d+ samples of \w+ are bad\. `on_bad_sample: skip` .*")
"""what a study says behind the first bad sample"""


def one_space(text: str) -> str:
    """A text whose lines are one: the page and terminals break lines anywhere."""
    return " ".join(text.split())


def quoted_messages() -> list[str]:
    """The messages of the page. A line that is indented continues the one before it."""
    messages: list[str] = []
    for block in snippets(PAGE, "text"):
        for line in block.splitlines():
            if line.startswith(" "):
                messages[-1] += line
            else:
                messages.append(line)
    return [one_space(message) for message in messages]


QUOTED = quoted_messages()


def assert_quoted(part: str, said: str, folder: Path) -> None:
    """Compare what was said with the message of the page that holds this part."""
    (expected,) = [message for message in QUOTED if part in message]
    # Recipes make paths absolute. The page is written as if everything were in one folder.
    said = one_space(said.replace(f"{folder}/", ""))
    # The page says once that a study counts its bad samples.
    if not BAD_SAMPLES.search(expected):
        said = BAD_SAMPLES.sub("", said)
    if expected.endswith(AND_SO_ON):
        expected = expected.removesuffix(AND_SO_ON)
        said = said[: len(expected)]
    assert said == expected


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with one picture."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("kitchen.jpg")
    return tmp_path


@pytest.mark.parametrize("part", BAD_RECORDS)
def test_messages_about_records(folder: Path, part: str) -> None:
    bad = BAD_RECORDS[part]
    write_samples(folder, [bad.record], "train.json")

    said = message_of(path="train.json", **bad.settings)

    assert_quoted(part, said, folder)


@pytest.mark.parametrize("part", BAD_SOURCES)
def test_messages_about_sources(folder: Path, part: str) -> None:
    said = BAD_SOURCES[part]()

    assert_quoted(part, said, folder)


@pytest.mark.parametrize("part", BAD_PICTURES)
def test_messages_about_pictures(folder: Path, part: str) -> None:
    name = part.split(":")[0]
    BAD_PICTURES[part](Path(name))

    with pytest.raises(LayerfuseError) as refused:
        Picture(name).open()

    assert_quoted(part, str(refused.value), folder)


@pytest.mark.parametrize("part", BAD_IMAGE_PROCESSORS)
def test_messages_about_image_processors(folder: Path, part: str) -> None:
    BAD_IMAGE_PROCESSORS[part].save_pretrained(part)
    # Two are refused as they are, the third because of what it cannot be changed to.
    ratio = None
    if part == "./own":
        ratio = "pad"

    with pytest.raises(LayerfuseError) as refused:
        load_image_processor(part, ratio)

    assert_quoted(part, str(refused.value), folder)


Content = dict[str, Any]
"""of a recipe file"""


def lose_a_picture(recipe: Content, folder: Path) -> None:
    # All others are in their places: one of eight samples is bad.
    (folder / "kitchen.jpg").unlink()


def lose_all_pictures(recipe: Content, folder: Path) -> None:
    lose_a_picture(recipe, folder)
    recipe["on_bad_sample"] = "skip"
    recipe["stages"]["align"]["data"]["limit"] = 1


def cut_the_answer(recipe: Content, folder: Path) -> None:
    # Tokens: behind the picture's 16, in the middle of the question.
    recipe["stages"]["align"]["max_length"] = 40


def cut_the_picture(recipe: Content, folder: Path) -> None:
    # Tokens: the template's own words come first, then the picture's 16.
    recipe["stages"]["align"]["max_length"] = 20


def ask_at_length(recipe: Content, folder: Path) -> None:
    # A token for each character.
    long_question = {"from": "human", "value": "<image>\n" + "n" * 600}
    records = records_of_stage()
    records[0]["conversations"] = [long_question, ANSWER]
    write_samples(folder, records, "train.json")


def want_long_answers(recipe: Content, folder: Path) -> None:
    # Of 512 positions, the question has the rest.
    recipe["evaluate"]["max_new_tokens"] = 500


def show_one_picture(recipe: Content, folder: Path) -> None:
    # Files of other names with the same bytes.
    for number in range(1, 8):
        shutil.copy("kitchen.jpg", f"{number}.png")


START = "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}"


def think_before_the_last_answer(recipe: Content, folder: Path) -> None:
    thought = "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    template = START + thought + "{{ m.content }}</s>\n{% endfor %}"
    (folder / "own.jinja").write_text(template)
    recipe["chat_template"] = "own.jinja"
    records = records_of_stage()
    # An answer that is not the last one.
    records[0]["conversations"] = [*TURNS, {"from": "human", "value": "Sure?"}, ANSWER]
    write_samples(folder, records, "train.json")


def end_no_answer(recipe: Content, folder: Path) -> None:
    (folder / "own.jinja").write_text(START + "{{ m.content }} {% endfor %}")
    recipe["chat_template"] = "own.jinja"


def leave_out_the_system(recipe: Content, folder: Path) -> None:
    template = START + "{% if m.role != 'system' %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    (folder / "own.jinja").write_text(template)
    recipe["chat_template"] = "own.jinja"
    records = records_of_stage()
    system = {"from": "system", "value": "Be brief."}
    records[0]["conversations"] = [system, *TURNS]
    write_samples(folder, records, "train.json")


BAD_STUDIES: dict[str, Callable[[Content, Path], None]] = {
    "no image file kitchen.jpg (train.json, index 0); 1 of 8": lose_a_picture,
    "no usable sample of align": lose_all_pictures,
    "no token is labelled": cut_the_answer,
    "would cut image tokens": cut_the_picture,
    "tokens, but the LLM has 512 positions": ask_at_length,
    "for the answer (max_new_tokens)": want_long_answers,
    "the test set has one picture": show_one_picture,
    "differ between training and the test": think_before_the_last_answer,
    "changes or leaves out what the system says": leave_out_the_system,
    "writes nothing behind the last answer": end_no_answer,
}


def records_of_stage() -> list[dict[str, Any]]:
    """Eight records, each about a picture of its own, seven of them the fixture's."""
    records = [good()]
    for number in range(1, 8):
        records.append(good(id=str(number), image=f"{number}.png"))
    return records


@pytest.mark.parametrize("part", BAD_STUDIES)
def test_messages_of_studies(folder: Path, recipe: Content, part: str) -> None:
    for name in ("train.json", "test.json"):
        write_samples(folder, records_of_stage(), name)
    recipe["stages"]["align"]["data"] = {"path": "train.json"}
    recipe["evaluate"]["data"] = {"path": "test.json"}
    BAD_STUDIES[part](recipe, folder)

    with pytest.raises(LayerfuseError) as refused:
        study(write_recipe(folder, recipe), output=folder / "study", console=Console(quiet=True))

    assert_quoted(part, str(refused.value), folder)


def test_every_message_of_the_page_is_made_by_one_of_these_tests() -> None:
    tables = (BAD_RECORDS, BAD_SOURCES, BAD_PICTURES, BAD_IMAGE_PROCESSORS, BAD_STUDIES)
    parts: list[str] = []
    for table in tables:
        parts.extend(table)

    # A message that nobody makes could say anything.
    for message in QUOTED:
        matching = [part for part in parts if part in message]
        assert len(matching) == 1, message
    assert len(QUOTED) == len(parts)


@pytest.mark.real
@pytest.mark.usefixtures("local_models")
def test_the_summary_of_the_page_is_that_of_the_quickstart() -> None:
    """Measured: its samples are drawn, and encoded as training does."""
    checked = load_checked(load_recipe(ROOT / "recipes" / "quickstart.yaml"))
    pictures = pictures_of(checked.usable.by_label().values())
    summaries = summarize_data(checked.usable, digests_of(pictures), checked.tokens)
    console = Console(width=80)

    with console.capture() as printed:
        print_data_summary(summaries, console)

    (block,) = snippets(PAGE, "console")
    # The page does not show the answers.
    assert one_space(printed.get()).startswith(one_space(block))


@pytest.mark.parametrize("text", snippets(PAGE, "json"))
def test_the_records_of_the_page_are_read(folder: Path, text: str) -> None:
    (folder / "train.json").write_text(text)

    samples = load(Data(path="train.json"))

    assert faults(samples) == {}
    (sample,) = samples
    assert [picture.name for picture in sample.pictures] == ["kitchen.jpg"]


@pytest.mark.parametrize("text", snippets(PAGE, "yaml"))
def test_the_settings_of_the_page_are_valid(text: str) -> None:
    """Each is a part of a recipe, or the data of a stage and of the test."""
    (readme_text,) = snippets(README, "yaml")
    content = yaml.safe_load(readme_text)
    settings = yaml.safe_load(text)

    data = settings.pop("data", None)
    if data is not None:
        content["stages"]["finetune"]["data"] = data
        content["evaluate"]["data"] = data
    content.update(settings)

    recipe = Recipe.model_validate(content)
    if data is not None:
        assert recipe.evaluate.data == Data.model_validate(data)


def test_every_snippet_of_the_page_is_looked_at() -> None:
    fences = re.findall(r"^```(.*)$", PAGE.read_text("utf-8"), re.MULTILINE)

    # Every second one ends a snippet.
    assert set(fences[::2]) == {"text", "json", "yaml", "console"}
    assert set(fences[1::2]) == {""}
