"""The feature cache never exceeds its limit, and a full disk costs nothing that was there."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from layerfuse.data import feature_shards as shards
from layerfuse.errors import LayerfuseError
from tests.counting_encoder import change_last_byte, encode, make_pictures, shard_files

pytestmark = pytest.mark.usefixtures("home")


def test_the_limit_is_known_before_anything_is_written(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = make_pictures(tmp_path)
    monkeypatch.setenv("LAYERFUSE_CACHE_GB", "0.000001")

    expected = r"need .* GB beside .* allows 1e-06 GB .*`layerfuse cache cle"
    with pytest.raises(LayerfuseError, match=expected):
        encode(pictures)

    assert shard_files(home) == []


def test_only_what_is_missing_counts_for_the_limit(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = make_pictures(tmp_path)
    encode(pictures, (1, 3))
    held_bytes = sum(file.stat().st_size for file in shard_files(home))
    # Room for 3.6 layers: for the two that are there and the one that is missing, but not for the
    # two and all three.
    limit_gb = 1.8 * held_bytes / 1e9
    monkeypatch.setenv("LAYERFUSE_CACHE_GB", f"{limit_gb:.9f}")

    encode(pictures, (1, 2, 3))


def test_a_limit_that_is_no_number_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `float` reads "nan", and nothing is larger than it: there would be no limit.
    monkeypatch.setenv("LAYERFUSE_CACHE_GB", "nan")

    expected = r"\$LAYERFUSE_CACHE_GB must be a number of GB, not 'nan'"
    with pytest.raises(LayerfuseError, match=expected):
        encode(make_pictures(tmp_path, 11))


def fail_half_way(tensors: Any, file: Path, **_: Any) -> None:
    """What safetensors does on a full disk."""
    file.write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = make_pictures(tmp_path)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", fail_half_way)
        with pytest.raises(LayerfuseError, match=r"cannot write .*No space left"):
            encode(pictures)

    names = {file.name for file in home.rglob("*") if file.is_file()}
    # Locks stay, so that a process that waits and one that comes later use the same file.
    assert names <= {".lock"}
    # As soon as there is room again
    encode(pictures)


def test_a_full_disk_does_not_cost_what_is_intact_of_a_damaged_file(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(make_pictures(tmp_path, 4))
    file = shard_files(home)[0]
    change_last_byte(file)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", fail_half_way)
        with pytest.raises(LayerfuseError, match=r"cannot write .*No space left"):
            list(shards.drop_damaged())
    assert file.exists()

    lines = list(shards.drop_damaged())
    assert lines == [f"{file}: 1 damaged, 3 kept"]
