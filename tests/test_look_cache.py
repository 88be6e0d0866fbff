"""A look at an encoder encodes no picture that a study or an earlier look has encoded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerfuse.look.pictures import find_pictures
from layerfuse.look.probe import pooled
from layerfuse.model.pretrained import load_image_processor
from layerfuse.progress import Progress, silent
from layerfuse.study.coordinate import study
from layerfuse.vision.encoder import load_encoder
from tests.small_look import save_encoder_and_pictures
from tests.studies import write_recipe

BATCH = 2


@dataclass
class Encoded:
    """Counts the batches that are encoded, and may stop the work as Ctrl-C does."""

    stop_after: int | None = None
    batches: list[int] = field(default_factory=list)

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        if phase != "encoding pictures":
            return
        self.batches.append(done)
        # The batch before this one is on disk.
        if done == self.stop_after:
            raise KeyboardInterrupt


def look(encoder: Path, images: Path, grid: int = 2, progress: Progress = silent) -> np.ndarray:
    """The pooled features of the pictures in a folder or a LLaVA file."""
    return pooled(
        load_encoder(str(encoder)),
        load_image_processor(str(encoder)),
        find_pictures(str(images)),
        grid=grid,
        batch_size=BATCH,
        progress=progress,
    )


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an encoder and six images, and with the cache."""
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    save_encoder_and_pictures(tmp_path)
    return tmp_path


def test_what_a_study_has_encoded_is_not_encoded_again(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    recipe["token_grid"] = [2, 2]
    every_layer = {"layers": [0, 1, 2, 3, 4], "fusion": {"name": "concat"}}
    recipe["arms"] = [every_layer]
    study(write_recipe(tmp_path, recipe), output=tmp_path / "study")
    encoded = Encoded()

    look(tmp_path / "encoder", tmp_path / "data.json", grid=2, progress=encoded)

    assert encoded.batches == []
    # Cells of another grid are other features.
    look(tmp_path / "encoder", tmp_path / "data.json", grid=4, progress=encoded)
    assert encoded.batches == [1, 2, 3, 4]


@pytest.mark.parametrize("grid", [2, 3])
def test_a_stopped_look_goes_on_where_it_was(
    saved: Path,
    grid: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four by four patches: with a grid of three the mean token takes a pass of its own."""
    # What is encoded is written at once, not after a minute.
    monkeypatch.setattr("layerfuse.data.feature_store.SHARD_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        look(saved / "encoder", saved / "images", grid, Encoded(stop_after=2))
    encoded = Encoded()

    continued = look(saved / "encoder", saved / "images", grid, encoded)

    # Six pictures are three batches, of which one is on disk.
    passes = 1 if grid == 2 else 2
    assert len(encoded.batches) == passes * 3 - 1
    monkeypatch.setenv("LAYERFUSE_HOME", str(saved / "another"))
    whole = look(saved / "encoder", saved / "images", grid)
    assert np.array_equal(continued, whole)
