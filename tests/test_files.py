"""Folders that are written whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layerfuse.errors import LayerfuseError
from layerfuse.files import refuse_filled, whole_folder


def names_in(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_what_stands_beside_a_folder_is_left_alone(tmp_path: Path) -> None:
    """Also under the name that an unfinished folder may have."""
    beside = tmp_path / "model.tmp"
    beside.mkdir()
    (beside / "thesis.txt").write_text("mine")

    with whole_folder(tmp_path / "model") as unfinished:
        (unfinished / "weights").write_text("all")

    assert names_in(tmp_path) == ["model", "model.tmp"]
    assert names_in(tmp_path / "model") == ["weights"]
    assert (beside / "thesis.txt").read_text() == "mine"


def test_a_folder_is_as_open_as_others_are(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()

    with whole_folder(tmp_path / "model"):
        pass

    assert (tmp_path / "model").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(LayerfuseError, match=r"current folder.* give another --output"):
        refuse_filled(Path())
    with (
        pytest.raises(LayerfuseError, match=r"current folder.* give another --output"),
        whole_folder(tmp_path),
    ):
        pass


def test_weights_that_cannot_be_written_are_one_error(tmp_path: Path) -> None:
    """And nothing is left of them."""
    with (
        pytest.raises(LayerfuseError, match=r"cannot write .*model: "),
        whole_folder(tmp_path / "model") as unfinished,
    ):
        save_file({"weight": torch.ones(2)}, unfinished / "missing" / "model.safetensors")

    assert names_in(tmp_path) == []
