"""Files of samples, written and read for tests."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from layerfuse.data.lazy_records import Samples
from layerfuse.data.sample import Sample
from layerfuse.data.sources import faults, load
from layerfuse.recipe.data_source import Data


@dataclass
class Fault:
    """What is wrong with a sample."""

    index: int
    """of the record in its source"""
    sample_id: str
    reason: str


def turns(*texts: str) -> list[dict[str, str]]:
    """A conversation as LLaVA writes it, in which the user has the first turn."""
    conversation = []
    for place, text in enumerate(texts):
        speaker = "human"
        if place % 2 == 1:
            speaker = "gpt"
        conversation.append({"from": speaker, "value": text})
    return conversation


def save_picture(file: Path, colour: str = "red") -> str:
    """Write a PNG of one colour, 40 x 30 pixels, and give the file's name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(file)
    return file.name


def load_path(path: Path) -> Samples:
    """The samples of a file or a folder, as a recipe's `path` reads them."""
    data = Data(path=str(path))
    return load(data)


def load_dataset(folder: Path, **settings: Any) -> Samples:
    """The samples of a saved dataset, as a recipe's `dataset` reads them."""
    data = Data(dataset=str(folder), **settings)
    return load(data)


def load_records(folder: Path, *records: Any) -> Samples:
    """The samples of a LLaVA file `data.json`, which is written with these records."""
    file = folder / "data.json"
    # json.dumps writes everything but ASCII as escapes, halves of surrogate pairs too.
    file.write_text(json.dumps(records))
    return load_path(file)


def save_lines(file: Path, *records: Any) -> None:
    """Write records as JSON lines."""
    lines = [json.dumps(record) for record in records]
    file.write_text("\n".join(lines))


def texts_of(sample: Sample) -> list[str]:
    """What each turn of a sample says."""
    return [message["content"] for message in sample.messages]


def last_texts(samples: Samples) -> list[str]:
    """The last answer of each sample."""
    return [texts_of(sample)[-1] for sample in samples]


def ids_of(samples: Samples) -> list[str]:
    """The id of each sample, in order."""
    return [sample.id for sample in samples]


def only_fault(samples: Samples) -> Fault:
    """The one fault that these samples have."""
    by_index = faults(samples)
    assert len(by_index) == 1, by_index
    ((index, (sample_id, reason)),) = by_index.items()
    return Fault(index, sample_id, reason)
