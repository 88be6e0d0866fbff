"""`layerfuse similarity`: interruptions, the report and its figures, options that cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModel

from layerfuse.errors import LayerfuseError
from layerfuse.look import similarity as verb
from layerfuse.look.grouping import all_groups
from layerfuse.look.pictures import find_pictures
from layerfuse.look.report_file import read_report
from layerfuse.look.similarity_report import SimilarityReport
from layerfuse.model.pretrained import load_image_processor
from layerfuse.progress import Progress, silent
from layerfuse.vision.encoder import Encoder, load_encoder
from layerfuse.vision.picture import Picture
from tests import tiny
from tests.test_similarity import all_numbers, assert_same

ENCODERS = ("clip", "siglip")


def save_encoder(folder: Path, size: int, width: int) -> None:
    """Save a random encoder of the kind that the folder is named after."""
    config = tiny.vision_config(folder.name, image_size=size, hidden_size=width)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny.image_processor(size, size).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two saved encoders of other widths and grids, and seven pictures."""
    save_encoder(tmp_path / "clip", size=32, width=24)
    save_encoder(tmp_path / "siglip", size=48, width=18)
    (tmp_path / "in").mkdir()
    pictures = torch.randint(0, 255, (7, 30, 40, 3), dtype=torch.uint8)
    for place, pixels in enumerate(pictures):
        picture = Image.fromarray(pixels.numpy())
        picture.save(tmp_path / "in" / f"{place}.png")
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of every picture that is opened."""
    names: list[str] = []
    plain_open = Picture.open

    def noted_open(picture: Picture) -> Image.Image:
        names.append(Path(picture.name).stem)
        return plain_open(picture)

    monkeypatch.setattr(Picture, "open", noted_open)
    return names


def killed_at(pictures: int) -> Progress:
    """A progress that interrupts the pass after so many pictures."""

    def progress(
        phase: str,
        done: int,
        total: int,
        note: str = "",
    ) -> None:
        if done == pictures:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def measure(folder: Path) -> Callable[..., dict[str, Any]]:
    """One pass over the pictures, two a batch, with the statistics of both encoders."""
    processors = [load_image_processor(str(folder / name)) for name in ENCODERS]

    def run(
        encoders: list[Encoder],
        *,
        seed: int,
        unfinished: Path | None = None,
        progress: Progress = silent,
    ) -> dict[str, Any]:
        statistics = verb.measure(
            encoders,
            processors,
            find_pictures(str(folder / "in")),
            batch_size=2,
            seed=seed,
            unfinished=unfinished,
            progress=progress,
        )
        return all_numbers(statistics)

    return run


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ("none", 3),
        ("seed", 7),
        ("encoder", 7),
    ],
)
def test_a_killed_pass_continues(
    folder: Path,
    measure: Callable[..., dict[str, Any]],
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    left: int,
) -> None:
    """But for another seed or encoder it starts anew: the saved sums are not of that pass."""
    encoders = [load_encoder(str(folder / name)) for name in ENCODERS]
    unfinished = folder / "unfinished"
    # Save after every batch
    monkeypatch.setattr(verb, "SAVE_SECONDS", -1)

    # At 6 pictures, progress is told before they are saved: 4 are
    with pytest.raises(KeyboardInterrupt):
        measure(
            encoders,
            seed=0,
            unfinished=unfinished,
            progress=killed_at(6),
        )
    seed = 0
    if change == "seed":
        seed = 1
    if change == "encoder":
        weight = next(encoders[1].parameters())
        torch.nn.init.normal_(weight)
    opened.clear()
    continued = measure(encoders, seed=seed, unfinished=unfinished)

    all_pictures = ["0", "1", "2", "3", "4", "5", "6"]
    assert opened == all_pictures[-left:]
    assert continued["images"] == 7
    assert_same(continued, measure(encoders, seed=seed))


def written(folder: Path, **options: Any) -> dict[str, Any]:
    """The report that the verb writes of the pictures in the folder."""
    settings = {
        "images": str(folder / "in"),
        "batch_size": 3,
        "output": folder / "out",
        "console": Console(quiet=True),
        **options,
    }
    file = verb.similarity(str(folder / "clip"), **settings)
    return json.loads(file.read_text())


def test_the_verb_writes_a_report_and_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With sums saved after every batch, none may be left in the end
    monkeypatch.setattr(verb, "SAVE_SECONDS", -1)

    report = written(
        folder,
        by="cka_tokens",
        groups=0,
        other=str(folder / "siglip"),
    )

    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {
        "similarity.json",
        "similarity.png",
        "similarity.svg",
        "cross.png",
        "cross-last.png",
        "cross.svg",
        "cross-last.svg",
    }
    assert report["depth"] == 4
    assert report["layers"] == [0, 1, 2, 3, 4]
    assert report["images"] == 7
    assert np.array(report["cka_images"]).shape == (5, 5)
    assert np.array(report["cross_images"]).shape == (5, 5)


def test_the_verb_groups_by_the_matrix_it_was_asked_for(folder: Path) -> None:
    report = written(folder, by="cka_tokens", groups=0)

    # Layer 0, the embedding of patches, belongs to no group
    matrix = np.array(report["cka_tokens"])[1:, 1:]
    expected = all_groups(matrix, [1, 2, 3, 4])
    assert report["groups"]["3"]["groups"] == expected[3].groups
    # `groups=0` asks for the count with the widest silhouette, which only 2 and 3 have
    widths = {}
    for count in (2, 3):
        widths[count] = report["groups"][str(count)]["silhouette"]
    assert report["chosen"] == max(widths, key=lambda count: widths[count])


def test_three_pictures_can_be_compared_with_another_encoder(folder: Path) -> None:
    """They are too few for an unbiased CKA of pictures, but not for one of tokens."""
    report = written(folder, limit=3, other=str(folder / "siglip"))

    assert report["cross_images"] == [[None] * 5] * 5
    cross_tokens = np.array(report["cross_tokens"], dtype=float)
    assert np.isfinite(cross_tokens).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "cosinus"}, "no similarity 'cosinus'; valid: cosine, cosine_centred"),
        ({"groups": 5}, "5 groups cannot be made; valid: 0..4"),
        ({"groups": -1}, "-1 groups cannot be made; valid: 0..4"),
        ({"limit": 0}, "at least 1"),
        ({"by": "cka_images", "limit": 3}, "cka_images is undefined"),
    ],
)
def test_what_cannot_be_measured_writes_nothing(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayerfuseError, match=message):
        written(folder, **options)

    assert not list((folder / "out").glob("*"))


def test_a_damaged_unfinished_pass_is_named(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "similarity.unfinished").write_bytes(b"cut")

    with pytest.raises(LayerfuseError, match=r"similarity\.unfinished is damaged .*: delete it"):
        written(folder)


def test_a_damaged_report_is_named(tmp_path: Path) -> None:
    file = tmp_path / "similarity.json"
    file.write_text('{"depth": 4, "gro')

    with pytest.raises(LayerfuseError, match=r"similarity\.json is damaged .*: delete it"):
        read_report(file, SimilarityReport.from_json)


def test_features_of_the_cache_give_the_same_numbers(
    folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are encoded once: a second pass opens no picture."""
    monkeypatch.setenv("LAYERFUSE_HOME", str(folder / "home"))
    settings: dict[str, Any] = {
        "images": str(folder / "in"),
        "batch_size": 2,
        "console": Console(quiet=True),
    }

    def found(name: str, cached: bool) -> dict[str, Any]:
        file = verb.similarity(
            str(folder / "clip"), output=folder / name, cached=cached, **settings
        )
        return json.loads(file.read_text())

    plain = found("plain", cached=False)
    opened.clear()
    first = found("first", cached=True)
    assert len(opened) == 7
    opened.clear()
    second = found("second", cached=True)

    assert opened == []
    assert second == first
    for numbers in ("cosine", "cka_tokens", "cka_images", "entropy", "dimension"):
        np.testing.assert_allclose(first[numbers], plain[numbers], rtol=1e-3)
