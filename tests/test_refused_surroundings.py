"""What the machine lacks is said before any data are read."""

from pathlib import Path
from typing import Any

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.study.coordinate import study
from tests.studies import write_recipe


def test_flash_attention_that_is_not_installed(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Known only after the pictures were encoded, it would cost hours."""
    recipe["attn_implementation"] = "flash_attention_2"
    # Read before the check, they would be the error
    (tmp_path / "data.json").unlink()

    with pytest.raises(LayerfuseError, match="not installed: flash_attn, which the recipe"):
        study(write_recipe(tmp_path, recipe), output=tmp_path / "study")


@pytest.mark.parametrize("world_size", ["x", "1.5"])
def test_a_number_of_processes_that_is_none(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world_size: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)

    with pytest.raises(LayerfuseError, match=f"WORLD_SIZE is '{world_size}'"):
        study(write_recipe(tmp_path, recipe), output=tmp_path / "study")
