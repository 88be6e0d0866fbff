"""Mutated pictures and mutated records: an error that names them, or exactly what they hold.

Nothing else may leave the readers: no error but `LayerfuseError`, and no picture or text that
silently becomes another one.
"""

import copy
import io
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from layerfuse.data.picture import Picture
from layerfuse.data.records import Reading, from_llava
from layerfuse.data.sources import Samples, faults, load
from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.recipe.schema import Data

Pixels = NDArray[np.uint8]
Result = TypeVar("Result")

SHORT_AND_FULL = [300, pytest.param(2000, marks=pytest.mark.slow)]
MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16")
# EPS runs Ghostscript; the second row is written by programs that register themselves; ICNS holds
# megabytes of PNG and JPEG 2000, which are here by themselves; SPIDER has floating-point pixels.
NOT_FUZZED = {"EPS", "PDF", "BUFR", "GRIB", "HDF5", "WMF", "ICNS", "SPIDER"}
HEIGHT, WIDTH = 9, 14


def noise(mode: str) -> Image.Image:
    """Pixels of which every one matters."""
    drawn = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    image = Image.fromarray(drawn)
    if mode == "I;16":
        return Image.fromarray(drawn[..., 0].astype(np.uint16) * 257)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(drawn[..., 1]))
    return image.convert(mode)


def written() -> dict[str, bytes]:
    """A file of every format that Pillow writes and reads, of every mode that the format holds."""
    Image.init()
    files = {}
    for format_name in sorted(set(Image.SAVE) & set(Image.OPEN) - NOT_FUZZED):
        for mode in MODES:
            for is_turned in (False, True):
                options: dict[str, Any] = {}
                if is_turned:
                    if format_name not in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF"):
                        continue
                    # A new one for each: saving an AVIF takes the orientation out of it.
                    options["exif"] = Image.Exif()
                    options["exif"][0x112] = 6
                if format_name == "WEBP":
                    options["lossless"] = True
                file = io.BytesIO()
                try:
                    noise(mode).save(file, format_name, **options)
                    Image.open(file).load()
                # The format does not hold this mode, or is not read as it is written.
                except (OSError, ValueError, KeyError, SyntaxError):
                    continue
                label = f"{format_name} {mode}"
                if is_turned:
                    label += " turned"
                files[label] = file.getvalue()
    return files


def naive(content: bytes) -> list[Pixels]:
    """What Pillow's decoder makes of a file as 8-bit RGB: stored, and in all other orientations."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        transparent = image.has_transparency_data
        if image.mode.startswith("I"):
            grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255)
            colour = grey[..., None].repeat(3, 2)
        elif transparent:
            pixels = np.asarray(image.convert("RGBA")).astype(np.float64)
            share = pixels[..., 3:] / 255
            colour = pixels[..., :3] * share + 255 * (1 - share)
        else:
            colour = np.asarray(image.convert("RGB")).astype(np.float64)
    stored = colour.round().astype(np.uint8)
    turned = stored.transpose(1, 0, 2)
    by_orientation = []
    for pixels in (stored, turned):
        by_orientation += [pixels, pixels[:, ::-1], pixels[::-1], pixels[::-1, ::-1]]
    return by_orientation


def is_one_of(shown: Image.Image, candidates: list[Pixels]) -> bool:
    pixels = np.asarray(shown).astype(np.int64)
    for candidate in candidates:
        if candidate.shape != pixels.shape:
            continue
        # Blending over white rounds.
        if np.abs(candidate.astype(np.int64) - pixels).max() <= 1:
            return True
    return False


def flip(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def overwrite(content: bytearray, dice: random.Random) -> None:
    place = dice.randrange(len(content))
    size = min(dice.choice((1, 2, 4, 16)), len(content) - place)
    content[place : place + size] = dice.choice((b"\0", b"\xff", dice.randbytes(1))) * size


def near_the_start(content: bytearray, dice: random.Random) -> None:
    """Headers are short, and most of what can go wrong is in them."""
    content[dice.randrange(min(len(content), 64))] = dice.choice((0, 1, 127, 128, 255))


def remove(content: bytearray, dice: random.Random) -> None:
    place = dice.randrange(len(content))
    del content[place : place + dice.choice((1, 4, 50))]


def repeat(content: bytearray, dice: random.Random) -> None:
    place = dice.randrange(len(content))
    content[place:place] = content[place : place + dice.choice((1, 4, 50))]


def cut(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content)) :]


MUTATIONS = [flip, overwrite, near_the_start, remove, repeat, cut]


def mutate(content: bytes, dice: random.Random) -> tuple[bytes, bool]:
    """A mutated file, and whether it was only cut."""
    mutated = bytearray(content)
    mutations: list[Callable[[bytearray, random.Random], None]] = []
    for _ in range(dice.choice((1, 1, 2, 4))):
        mutation = dice.choice(MUTATIONS)
        if mutated:
            mutation(mutated, dice)
            mutations.append(mutation)
    return bytes(mutated), mutations == [cut]


def result_of(read: Callable[[], Result]) -> tuple[Result | None, str]:
    """What a reader returns, or None and the message of its error; any other error is raised."""
    try:
        return read(), ""
    except LayerfuseError as error:
        return None, str(error)


@pytest.fixture
def _bombs_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutated header may ask for gigabytes that Pillow allows."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)


@pytest.mark.usefixtures("_bombs_are_small")
@pytest.mark.filterwarnings("ignore")
def test_files_of_every_format_are_read() -> None:
    files = written()
    labels = {label.split()[0] for label in files}
    assert labels >= {"BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
    assert ("AVIF" in labels) == features.check("avif")
    for label, content in files.items():
        shown = Picture(label, lambda content=content: content).open()
        stored, *_ = candidates = naive(content)
        assert shown.mode == "RGB"
        if not label.endswith("turned"):
            candidates = [stored]
        elif not label.startswith("TIFF"):
            # The naive reader has TIFF turned already: Pillow does so by itself.
            candidates = [stored.transpose(1, 0, 2)[:, ::-1]]
        assert is_one_of(shown, candidates), label
        if label.endswith("turned"):
            assert shown.size == (HEIGHT, WIDTH), label


@pytest.mark.usefixtures("_bombs_are_small")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", SHORT_AND_FULL)
def test_mutated_pictures(count: int) -> None:
    """Refused by name, or exactly what the decoder makes of these bytes.

    Where a file says whether it is whole, nothing but its own picture comes out: PNG holds
    checksums, and a file that ends too early is seen in every format.
    """
    files = written()
    labels = list(files)
    num_read = 0
    for number in range(count):
        dice = random.Random(number)
        # One format after the other, so that every run has all of them.
        label = labels[number % len(labels)]
        content, is_cut = mutate(files[label], dice)
        picture = Picture(f"picture {number} ({label})", lambda content=content: content)
        try:
            candidates = naive(content)
        except Exception:
            candidates = []
        shown, reason = result_of(picture.open)
        if shown is None:
            assert picture.name in reason
            # What can be decoded is refused for what the message says alone.
            may_refuse = "its longer side" in reason or "floating-point" in reason
            # The naive reader looks neither at checksums nor for palettes.
            may_refuse = may_refuse or label.startswith(("PNG", "PCX"))
            assert may_refuse or not candidates, reason
            continue
        num_read += 1
        assert is_one_of(shown, candidates), picture.name
        if is_cut or label.startswith("PNG"):
            assert is_one_of(shown, naive(files[label])), picture.name
    # The mutations leave some to be read, and refuse some.
    assert count / 10 < num_read < count * 9 / 10


ODD_VALUES: list[Any] = [
    None,
    0,
    7,
    -1.5,
    10**30,
    float("nan"),
    True,
    "",
    " \n",
    "text",
    "\ud83d",
    "a\ude00b",
    "\0",
    "../" * 400,
    "😀\u2028\x85",
    IMAGE_TOKEN,
    [],
    {},
    [[]],
    [None],
    ["text", 3],
    {"from": "gpt", "value": "more"},
    {"from": ["gpt"], "value": {}},
]
KEYS = ("id", "image", "images", "conversations", "messages", "from", "role", "value", "content")
MORE_KEYS = ("families", "categories", "novel", "question", "answer", "text", "file_name", "")


def seeds() -> list[Any]:
    talk = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A"},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "B"},
    ]
    chat = [{"role": "system", "content": "Be brief"}]
    chat += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return [
        {"id": "llava", "image": "a.png", "conversations": talk, "families": ["count", "colour"]},
        {"id": 7, "images": ["a.png", "a.png"], "messages": chat, "novel": True},
        {"id": "row", "image": "a.png", "question": "What?", "answer": "A"},
        {"id": "caption", "file_name": "a.png", "text": "A", "categories": ["Other"]},
    ]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place inside a value: what holds it, and its key or index there."""
    inside: list[tuple[Any, Any]] = []
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    if isinstance(value, list):
        keys = list(range(len(value)))
    for key in keys:
        inside.append((value, key))
        inside += places(value[key])
    return inside


def mutate_record(record: Any, dice: random.Random) -> Any:
    mutated = [copy.deepcopy(record)]
    for _ in range(dice.choice((1, 1, 2, 5))):
        holder, key = dice.choice(places(mutated))
        kind = dice.randrange(6)
        value = holder[key]
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = [value]
        elif kind == 2 and isinstance(holder, dict):
            holder[dice.choice(KEYS + MORE_KEYS)] = holder.pop(key)
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(value))
        elif kind == 4 and isinstance(value, str):
            at = dice.randrange(len(value) + 1)
            holder[key] = value[:at] + str(dice.choice(ODD_VALUES)) + value[at:]
        else:
            holder[key] = copy.deepcopy(dice.choice(ODD_VALUES))
        if not mutated:
            return dice.choice(ODD_VALUES)
    return mutated[0]


def naive_answers(record: dict[str, Any]) -> list[str]:
    """The texts that a record has an assistant say."""
    turns = record.get("conversations") or record.get("messages")
    if not turns:
        return [record.get("answer", record.get("text"))]  # pyright: ignore
    said = []
    for turn in turns:
        if turn.get("from", turn.get("role")) in ("gpt", "assistant"):
            said.append(turn.get("value", turn.get("content")))
    return [text for text in said if text.strip()]


def naive_pictures(record: dict[str, Any]) -> list[str]:
    cell = record.get("image") or record.get("images") or []
    if isinstance(cell, str):
        return [cell]
    return cell


def check_samples(samples: Samples, records: list[Any]) -> int:
    """Every sample is a named fault, or says and shows what its record does.

    Returns:
        The number of samples that are no faults.
    """
    bad = faults(samples)
    for index, (sample_id, reason) in bad.items():
        assert f"sample {sample_id}: " in reason
        assert reason.endswith(f"({samples.source}, index {index})")
        # Can be printed and written.
        reason.encode()
        sample_id.encode()
    usable = samples.without(bad)
    for index, sample in zip(usable.order, usable, strict=True):
        said = [turn["content"] for turn in sample.messages if turn["role"] == "assistant"]
        # The picture's marker is put before a first turn that has none, whoever speaks.
        said = [text.removeprefix(IMAGE_TOKEN * len(sample.pictures) + "\n") for text in said]
        expected = naive_answers(records[index])
        stripped = [
            text.removeprefix(IMAGE_TOKEN * len(sample.pictures) + "\n") for text in expected
        ]
        assert said == stripped
        base = Path(samples.source).parent
        shown = [str(base / cell) for cell in naive_pictures(records[index])]
        assert [picture.name for picture in sample.pictures] == shown
        num_markers = sum(turn["content"].count(IMAGE_TOKEN) for turn in sample.messages)
        assert num_markers == len(sample.pictures)
        json.dumps(repr(sample)).encode()
        for picture in sample.pictures:
            picture.open()
    assert len(usable) + len(bad) == len(records)
    return len(usable)


@pytest.mark.parametrize("count", SHORT_AND_FULL)
def test_mutated_records(tmp_path: Path, count: int) -> None:
    """In a JSON file, and in a table beside the pictures."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    originals = seeds()
    records = []
    for number in range(count):
        dice = random.Random(number)
        records.append(mutate_record(originals[number % len(originals)], dice))
    (tmp_path / "d.json").write_text(json.dumps(records))
    samples = load(Data(path=str(tmp_path / "d.json")))
    num_usable = check_samples(samples, records)
    rows = []
    for record in records:
        if isinstance(record, dict):
            name = record.get("file_name")
            record = {"image": name, "id": name, **record}
        rows.append(record)
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    num_rows = check_samples(load(Data(path=str(tmp_path))), rows)
    # Two of the four kinds of records are rows, which a file of conversations does not hold.
    assert count / 30 < num_usable < num_rows < count * 9 / 10


@pytest.mark.parametrize("count", SHORT_AND_FULL)
def test_mutated_text_files(tmp_path: Path, count: int) -> None:
    """The bytes of files of records: an error that names the file, or samples as above."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    whole = json.dumps(seeds(), ensure_ascii=False, indent=1).encode()
    lines = "\r\n".join(json.dumps(record) for record in seeds()).encode()
    num_read = 0
    for number in range(count):
        dice = random.Random(number)
        content, _ = mutate(dice.choice((whole, lines)), dice)
        file = tmp_path / dice.choice(("d.json", "d.jsonl"))
        file.write_bytes(content)
        samples, reason = result_of(partial(load, Data(path=str(file))))
        if samples is None:
            assert str(file) in reason
            continue
        num_read += 1
        check_samples(samples, list(samples.records))
    assert count / 10 < num_read < count * 9 / 10


def test_odd_values_everywhere() -> None:
    """Every key of a record with every odd value: no draw decides what is tried."""
    for original in seeds():
        for number in range(len(places([original]))):
            for value in ODD_VALUES:
                changed = [copy.deepcopy(original)]
                holder, key = places(changed)[number]
                holder[key] = value
                samples = Samples(
                    changed, partial(from_llava, reading=Reading(Path("folder"))), "list"
                )
                faults(samples)
