"""One record of a file, read as a sample."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from layerfuse.data.from_records import Reading, from_llava
from layerfuse.data.sample import Sample

TURNS = [{"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "red"}]


def read(record: dict[str, Any], **settings: Any) -> Sample:
    """A record of a JSON file as a sample."""
    return from_llava(0, record, Reading(Path("folder"), **settings))


def png() -> bytes:
    """The bytes of a small red PNG."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    return file.getvalue()
