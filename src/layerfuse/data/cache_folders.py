"""The feature cache as a whole: what it holds, whether it is sound, and making room."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from layerfuse.data.cache import features_home
from layerfuse.data.shards import Entry, read_header, shards_of, write_shard

Say = Callable[[str], None]


def layer_folders(name: str = "") -> dict[str, Path]:
    """Every layer's folder by its name, <encoder and preprocessing>/<layer>, that begins so."""
    root = features_home()
    found = sorted({shard.parent for shard in root.glob("*/*/*.safetensors")})
    named = {str(folder.relative_to(root)): folder for folder in found}
    return {own: folder for own, folder in named.items() if own.startswith(name)}


def show(say: Say) -> None:
    """One line per layer: encoder, layer, token grid, dtype, distinct pictures, size; the sum."""
    total = 0
    for name, folder in layer_folders().items():
        pictures: set[str] = set()
        what = "damaged; see `layerfuse cache verify`"
        for file in shards_of(folder):
            try:
                entries, grid, about = read_header(file)
            except OSError:
                continue  # `verify` names and removes it
            pictures |= set(entries)
            what = f"{about['encoder']}, layer {about['layer']}, {grid}, {about['dtype']}"
        size = _size(folder)
        total += size
        say(f"{name}  {what}: {len(pictures):,} pictures, {size / 1e9:.2f} GB")
    say(f"{total / 1e9:.2f} GB in {features_home()}" if total else f"{features_home()} is empty")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in shards_of(folder))


def verify(say: Say) -> int:
    """Read every entry; drop the damaged ones, and what killed writers left. Returns the number of
    files that were mended; what is dropped is encoded again when it is needed."""
    mended = 0
    for folder in layer_folders().values():
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
    """Remove everything, or the folders whose name in `show` begins with `name`; the bytes freed.

    Raises ValueError if nothing has that name.
    """
    chosen = layer_folders(name or "")
    if name and not chosen:
        raise ValueError(f"nothing in the cache is called {name!r}; see `layerfuse cache list`")
    freed = 0
    for folder in chosen.values():
        with FileLock(folder.parent / ".lock"):
            freed += _size(folder)
            shutil.rmtree(folder)
    return freed
