"""Where layerfuse keeps what it downloads and computes."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The cache folder: `$LAYERFUSE_HOME`, else `layerfuse` in the user's cache directory."""
    chosen = os.environ.get("LAYERFUSE_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or f"{cache}/layerfuse").expanduser()
