"""A file of similar layers that is damaged or something else is one message."""

import json
from pathlib import Path
from typing import Any

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.vision.selection import select

GOOD: dict[str, Any] = {
    "depth": 4,
    "groups": {
        "2": {"groups": [[1, 2], [3, 4]], "representatives": [1, 4]},
    },
}
"""a file of `layerfuse similarity` about an encoder of four blocks"""


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "sim.json"
    file.write_text(json.dumps(GOOD))

    assert select(f"similarity:2@{file}", 4).layers == (1, 4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        # Truncated, as by a full disk
        b'{"depth": 4, "gro',
        # Not UTF-8
        b"\xff\xfe\x00",
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "sim.json"
    file.write_bytes(content)

    with pytest.raises(LayerfuseError, match=r"cannot read .*sim\.json: .* writes it again"):
        select(f"similarity:2@{file}", 4)


@pytest.mark.parametrize(
    "groups",
    [
        [],
        3,
        {"two": {"groups": [], "representatives": []}},
        {"2": []},
        {"2": {"groups": [[1, 2], [3, 4]]}},
        {"2": {"groups": 7, "representatives": [1, 4]}},
        {"2": {"groups": [1, 2], "representatives": [1, 4]}},
        {"2": {"groups": [[1, 2], [3, 4]], "representatives": 1}},
        {"2": {"groups": [[1, 2], [3, "x"]], "representatives": [1, 4]}},
        {"2": {"groups": [[1, 2], [3, 4]], "representatives": [1, None]}},
        {"2": {"groups": [[1, 2], [3, 4]], "representatives": [True, 4]}},
        {"2": {"groups": [], "representatives": []}},
        # Three groups where two were asked for
        {"2": {"groups": [[1], [2], [3]], "representatives": [1, 2, 3]}},
        {"2": {"groups": [[], [1]], "representatives": [1]}},
        {"2": {"groups": [[1, 9]], "representatives": [9]}},
    ],
)
@pytest.mark.parametrize("suffix", ["", ":groups"])
def test_groups_of_another_shape(tmp_path: Path, groups: Any, suffix: str) -> None:
    file = tmp_path / "sim.json"
    file.write_text(json.dumps({"depth": 4, "groups": groups}))

    with pytest.raises(LayerfuseError):
        select(f"similarity:2@{file}{suffix}", 4)
