"""Where layerfuse keeps what it downloads and computes."""

import os
from pathlib import Path


def home() -> Path:
    """The cache folder: `$LAYERFUSE_HOME`, else `layerfuse` in the user's cache directory.

    Returns:
        A path that may not exist yet.
    """
    # Read at each call: tests and notebooks change it while the process runs.
    chosen = os.environ.get("LAYERFUSE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    # An empty variable counts as unset, as the XDG specification says.
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(f"{user_cache}/layerfuse").expanduser()
