"""Files that are written whole or not at all."""

from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write a file, and its folder, so that whoever reads it finds the old text or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
