"""The feature cache as a whole: what it holds, whether it is sound, and making room."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from layerfuse.data.cache import features_home
from layerfuse.data.shards import Entry, read_header, shards_of, write_shard

Say = Callable[[str], None]


@dataclass(frozen=True)
class Layer:
    """One layer's folder of the cache."""

    name: str
    """<encoder and preprocessing>/<layer>"""
    about: str
    pictures: int
    bytes: int


def layer_folders() -> list[Path]:
    """Every layer's folder."""
    return sorted({shard.parent for shard in features_home().glob("*/*/*.safetensors")})


def held() -> list[Layer]:
    """What the cache holds, per encoder, preprocessing and layer."""
    found = []
    for folder in layer_folders():
        pictures: set[str] = set()
        about = "damaged"
        for file in shards_of(folder):
            try:
                header = read_header(file)
            except OSError:
                continue  # `verify` names and removes it
            pictures |= set(header.entries)
            a = header.about
            about = f"{a['encoder']} ({a['width']}), layer {a['layer']}, {a['grid']}, {a['dtype']}"
        size = sum(file.stat().st_size for file in shards_of(folder))
        found.append(Layer(f"{folder.parent.name}/{folder.name}", about, len(pictures), size))
    return found


def verify(say: Say) -> int:
    """Read every entry; drop the damaged ones, and what killed writers left. Returns the number of
    files that were mended; what is dropped is encoded again when it is needed."""
    mended = 0
    for folder in layer_folders():
        with FileLock(folder.parent / ".lock"):
            for stale in folder.glob("*.tmp"):
                stale.unlink()
            for file in shards_of(folder):
                kept, damaged = _intact(file)
                if damaged == 0:
                    continue
                mended += 1
                say(f"{file}: {damaged or 'all'} damaged, {len(kept)} kept")
                if kept:
                    header = read_header(file)
                    pairs = {digest: entry.read() for digest, entry in kept.items()}
                    write_shard(folder, pairs, header.grid, header.about)
                file.unlink()
    return mended


def _intact(file: Path) -> tuple[dict[str, Entry], int | None]:
    """The intact entries and the number of damaged ones; None if the file cannot be read."""
    try:
        entries = read_header(file).entries
        kept = {k: entry for k, entry in entries.items() if entry.is_intact(entry.read())}
    except OSError:
        return {}, None
    return kept, len(entries) - len(kept)


def clear(name: str | None) -> int:
    """Remove everything, or the folders whose name in `held` begins with `name`; the bytes freed.

    Raises ValueError if nothing has that name.
    """
    chosen = [layer for layer in held() if layer.name.startswith(name or "")]
    if name and not chosen:
        raise ValueError(f"nothing in the cache is called {name!r}; see `layerfuse cache list`")
    for layer in chosen:
        folder = features_home() / layer.name
        with FileLock(folder.parent / ".lock"):
            shutil.rmtree(folder)
    return sum(layer.bytes for layer in chosen)


def show(say: Say) -> None:
    """One line per layer, and the sum."""
    layers = held()
    for layer in layers:
        say(f"{layer.name}  {layer.about}: {layer.pictures:,} pictures, {layer.bytes / 1e9:.2f} GB")
    total = sum(layer.bytes for layer in layers) / 1e9
    say(f"{total:.2f} GB in {features_home()}" if layers else f"{features_home()} is empty")
