"""What docs/data.md shows is true: its messages are those of the code, its examples are read."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console
from transformers import (
    BitImageProcessorPil,
    ConvNextImageProcessorPil,
    LlavaNextImageProcessorPil,
)

from layerfuse.data.picture import Picture
from layerfuse.data.sources import faults, load
from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import with_fixed_date
from layerfuse.model.pretrained import load_image_processor
from layerfuse.recipe.schema import Data, Recipe
from layerfuse.study.coordinate import study
from layerfuse.study.data_summary import CommonAnswer, SourceSummary, print_data_summary
from tests.studies import write_recipe, write_samples
from tests.test_docs import README, ROOT, snippets
from tests.test_picture_depths import png

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
    # Recipes make paths absolute; the page is written as if everything were in one folder.
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


QUESTION = {"from": "human", "value": "<image>\nHow many chairs are there?"}
ANSWER = {"from": "gpt", "value": "Two."}
TURNS = [QUESTION, ANSWER]
GOOD = {"id": "kitchen-1", "image": "kitchen.jpg", "conversations": TURNS}


def good(**changes: Any) -> dict[str, Any]:
    """A record that is read, or a bad one by these changes."""
    return {**GOOD, **changes}


def message_of(**data: Any) -> str:
    """What is said of some data, as a recipe names it: of its first bad sample, or of all of it."""
    try:
        by_index = faults(load(Data.model_validate(data)))
    except LayerfuseError as error:
        return str(error)
    _, reason = next(iter(by_index.values()))
    return reason


@dataclass(frozen=True)
class BadRecord:
    """A record of a JSON file, and how the recipe reads it."""

    record: Any
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


PICTURE_PART = {"role": "user", "content": [{"type": "image", "path": "kitchen.jpg"}]}
VIDEO_PART = {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}
VIDEO_MARKER = {"from": "human", "value": "<video>\nWhat happens?"}
WITHOUT_PICTURE = {"id": "kitchen-1", "conversations": [{**QUESTION, "value": "?"}, ANSWER]}

# By a part of the message that no other message of the page holds.
BAD_RECORDS = {
    "1 <image> markers": BadRecord(good(image=["kitchen.jpg", "garden.jpg"])),
    "no answer to learn from": BadRecord(good(conversations=[QUESTION])),
    "has both image and images": BadRecord(good(images=["garden.jpg"])),
    "'from': 'tool'": BadRecord(good(conversations=[QUESTION, {"from": "tool", "value": "2"}])),
    "not a mapping with keys": BadRecord("text"),
    "is elsewhere": BadRecord(good(image="https://example.org/kitchen.jpg")),
    "its turns name 1 pictures": BadRecord(
        {"image": "garden.jpg", "messages": [PICTURE_PART, ANSWER]}
    ),
    "cannot read the part": BadRecord({"messages": [VIDEO_PART, ANSWER]}),
    "nobody reads 'imgs'": BadRecord({**WITHOUT_PICTURE, "imgs": ["kitchen.jpg"]}),
    "has no column imgs": BadRecord(
        {"image": "kitchen.jpg", "conversations": TURNS},
        {"columns": {"images": "imgs"}},
    ),
    "reads 'crop' as 'image'": BadRecord(
        good(crop="chair.jpg"),
        {"columns": {"image": "crop"}},
    ),
    "half a surrogate pair": BadRecord(
        good(conversations=[QUESTION, {"from": "gpt", "value": "\ud83d"}]),
    ),
    "holds <video>": BadRecord(good(conversations=[VIDEO_MARKER, ANSWER])),
    "holds <img>": BadRecord(
        good(conversations=[QUESTION, {"from": "gpt", "value": "Write <img>."}]),
    ),
    "families is a str": BadRecord(good(families="count")),
}


@pytest.mark.parametrize("part", BAD_RECORDS)
def test_messages_about_records(folder: Path, part: str) -> None:
    bad = BAD_RECORDS[part]
    write_samples(folder, [bad.record], "train.json")

    said = message_of(path="train.json", **bad.settings)

    assert_quoted(part, said, folder)


def save_dataset(*columns: str) -> None:
    """Save the dataset `chairs` of one row, with these columns of pictures."""
    cell = {"bytes": Path("kitchen.jpg").read_bytes(), "path": None}
    content: dict[str, list[Any]] = {"answer": ["Two."]}
    for column in columns:
        content[column] = [cell]
    dataset = datasets.Dataset.from_dict(content)
    for column in columns:
        dataset = dataset.cast_column(column, datasets.Image())
    datasets.DatasetDict({"train": dataset}).save_to_disk("chairs")


def name_another_split() -> str:
    save_dataset("image")
    return message_of(dataset="chairs", split="test")


def bring_another_column() -> str:
    save_dataset("image", "depth")
    return message_of(dataset="chairs")


def message_of_photos(*names: str, table: dict[str, str] | None = None) -> str:
    """What is said of a folder with files of these names, and a table of one row if it is given."""
    photos = Path("photos")
    photos.mkdir()
    for name in names:
        shutil.copy("kitchen.jpg", photos / name)
    if table is not None:
        (photos / "metadata.jsonl").write_text(json.dumps(table))
    return message_of(path="photos")


def forget_all_pictures() -> str:
    return message_of_photos()


def forget_all_captions() -> str:
    return message_of_photos("kitchen.jpg")


def forget_one_caption() -> str:
    # Its caption is read; what it says does not matter.
    Path("photos").mkdir()
    shutil.copy("kitchen.jpg", "photos/garden.jpg")
    shutil.copy("kitchen.jpg", "photos/kitchen.jpg")
    Path("photos/kitchen.txt").write_text("Two chairs.")
    return message_of(path="photos")


def call_a_caption_otherwise() -> str:
    row = {"file_name": "kitchen.jpg", "caption": "Two chairs."}
    return message_of_photos("kitchen.jpg", table=row)


def name_no_picture() -> str:
    return message_of_photos(table={"text": "Two chairs."})


def message_of_bytes(content: bytes) -> str:
    """What is said of a file `train.json` with this content."""
    Path("train.json").write_bytes(content)
    return message_of(path="train.json")


def leave_out_a_quote() -> str:
    return message_of_bytes(b'{"id": 1}\n{"id": 2}\n{"id": 3, oops}\n')


def write_utf_16() -> str:
    return message_of_bytes(b"\xff\xfe" + "[]".encode("utf-16-le"))


def write_latin_1() -> str:
    return message_of_bytes('[\n{"id": "caf\xe9"}]'.encode("latin-1"))


def wrap_the_list() -> str:
    return message_of_bytes(b'{"data": []}')


def compute_the_date() -> str:
    with pytest.raises(LayerfuseError) as refused:
        with_fixed_date("Today: {{ strftime_now(day_format) }}")
    return str(refused.value)


BAD_SOURCES: dict[str, Callable[[], str]] = {
    "has no split": name_another_split,
    "nobody reads the column 'depth'": bring_another_column,
    "photos: no images": forget_all_pictures,
    "photos: no caption file": forget_all_captions,
    "sample garden.jpg": forget_one_caption,
    "needs a column": call_a_caption_otherwise,
    "names no picture": name_no_picture,
    "is not valid JSON": leave_out_a_quote,
    "byte order mark ff fe": write_utf_16,
    "the byte 0xe9": write_latin_1,
    "must hold a list": wrap_the_list,
    "writes today's date": compute_the_date,
}


@pytest.mark.parametrize("part", BAD_SOURCES)
def test_messages_about_sources(folder: Path, part: str) -> None:
    said = BAD_SOURCES[part]()

    assert_quoted(part, said, folder)


def save_eps(file: Path) -> None:
    Image.new("RGB", (6, 4)).save(file, "EPS")


def save_text(file: Path) -> None:
    file.write_text("no picture")


def save_half(file: Path) -> None:
    Image.new("RGB", (40, 30)).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def save_line(file: Path) -> None:
    Image.new("L", (20000, 50)).save(file)


def save_signed(file: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.int32)).save(file)


def save_floating_point(file: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.float32)).save(file)


def save_fits(file: Path) -> None:
    header = b""
    for card in ("SIMPLE  =                    T", "BITPIX  =                   16"):
        header += card.encode().ljust(80)
    for name, number in {"NAXIS": 2, "NAXIS1": 2, "NAXIS2": 2}.items():
        header += f"{name:<8}= {number:>20}".encode().ljust(80)
    header += b"END"
    # Both the header and the data fill blocks of this size.
    file.write_bytes(header.ljust(2880) + bytes(2880))


RAMP = np.arange(4096).reshape(64, 64)


def save_beyond_the_highest(file: Path) -> None:
    # The tag SMaxSampleValue.
    Image.fromarray(RAMP.astype(np.uint16)).save(file, tiffinfo={341: 4000})


def save_unscaled_colours(file: Path) -> None:
    file.write_bytes(png(np.stack([RAMP, RAMP, RAMP], axis=-1), significant_bits=12))


BAD_PICTURES: dict[str, Callable[[Path], None]] = {
    "figure.png": save_eps,
    "page.png": save_text,
    "half.bmp": save_half,
    "line.png": save_line,
    "scan.tif: signed pixels": save_signed,
    "depth.tif": save_floating_point,
    "sky.fits": save_fits,
    "scan.tif: samples from 0": save_beyond_the_highest,
    "scan.png": save_unscaled_colours,
}


@pytest.mark.parametrize("part", BAD_PICTURES)
def test_messages_about_pictures(folder: Path, part: str) -> None:
    name = part.split(":")[0]
    BAD_PICTURES[part](Path(name))

    with pytest.raises(LayerfuseError) as refused:
        Picture(name).open()

    assert_quoted(part, str(refused.value), folder)


BAD_IMAGE_PROCESSORS: dict[str, Any] = {
    "./enc": BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False),
    "./tiles": LlavaNextImageProcessorPil(),
    "./own": ConvNextImageProcessorPil(),
}


@pytest.mark.parametrize("part", BAD_IMAGE_PROCESSORS)
def test_messages_about_image_processors(folder: Path, part: str) -> None:
    BAD_IMAGE_PROCESSORS[part].save_pretrained(part)
    ratio = "pad" if part == "./own" else None

    with pytest.raises(LayerfuseError) as refused:
        load_image_processor(part, ratio)

    assert_quoted(part, str(refused.value), folder)


Content = dict[str, Any]
"""of a recipe file"""


def lose_a_picture(recipe: Content, folder: Path) -> None:
    (folder / "kitchen.jpg").unlink()


def lose_all_pictures(recipe: Content, folder: Path) -> None:
    lose_a_picture(recipe, folder)
    recipe["on_bad_sample"] = "skip"
    recipe["stages"]["align"]["data"]["limit"] = 1


def cut_the_answer(recipe: Content, folder: Path) -> None:
    recipe["stages"]["align"]["max_length"] = 40


def cut_the_picture(recipe: Content, folder: Path) -> None:
    recipe["stages"]["align"]["max_length"] = 20


def ask_at_length(recipe: Content, folder: Path) -> None:
    long_question = {"from": "human", "value": "<image>\n" + "n" * 600}
    records = records_of_stage()
    records[0]["conversations"] = [long_question, ANSWER]
    write_samples(folder, records, "train.json")


def want_long_answers(recipe: Content, folder: Path) -> None:
    recipe["evaluate"]["max_new_tokens"] = 500


def show_one_picture(recipe: Content, folder: Path) -> None:
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


BAD_STUDIES: dict[str, Callable[[Content, Path], None]] = {
    "no image file kitchen.jpg (train.json, index 0); 1 of 8": lose_a_picture,
    "no usable sample of align": lose_all_pictures,
    "no token is labelled": cut_the_answer,
    "would cut image tokens": cut_the_picture,
    "tokens, but the LLM has 512 positions": ask_at_length,
    "for the answer (max_new_tokens)": want_long_answers,
    "the test set has one picture": show_one_picture,
    "differ between training and the test": think_before_the_last_answer,
    "writes nothing behind the last answer": end_no_answer,
}


def records_of_stage() -> list[dict[str, Any]]:
    """Eight records, each about a picture of its own."""
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

    for message in QUOTED:
        matching = [part for part in parts if part in message]
        assert len(matching) == 1, message
    assert len(QUOTED) == len(parts)


def test_the_summary_of_the_page_is_printed_so() -> None:
    """The numbers are those of the quickstart."""
    common = [CommonAnswer("top", 0.05)]
    summaries = [
        SourceSummary("align", 1000, 1000, 0, 1000, 1.0, common, [32, 32.0, 32]),
        SourceSummary("finetune", 1000, 1000, 0, 5000, 5.0, common, [44, 45.0, 46]),
        SourceSummary("evaluate", 200, 200, 0, 1000, 5.0, common, [44, 45.0, 46]),
    ]
    console = Console(width=90)

    with console.capture() as printed:
        print_data_summary(summaries, console)

    (block,) = snippets(PAGE, "console")
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
    assert recipe.evaluate.data == recipe.stages["finetune"].data or data is None


def test_every_snippet_of_the_page_is_looked_at() -> None:
    fences = re.findall(r"^```(.+)$", PAGE.read_text("utf-8"), re.MULTILINE)

    assert set(fences) == {"text", "json", "yaml", "console"}
