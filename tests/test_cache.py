"""The feature cache: addressed by content, whole or absent, shared, checked when it is read."""

import os
import pickle
import threading
import time
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError
from typer.testing import CliRunner

from layerfuse.cli import app
from layerfuse.data import feature_shards as shards
from layerfuse.data import feature_store as cache
from layerfuse.data.collate import Collator
from layerfuse.data.feature_store import FeatureStore, cached_features
from layerfuse.data.picture import Picture
from layerfuse.errors import LayerfuseError
from layerfuse.vision.encoder import Encoder
from layerfuse.vision.features import Features
from tests import tiny
from tests.processes import FORKS, start


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "features"


def make_pictures(folder: Path, count: int = 10) -> list[Picture]:
    for k in range(count):
        Image.new("RGB", (40, 30), f"rgb({20 * k},0,90)").save(folder / f"{k}.png")
    return [Picture(str(folder / f"{k}.png")) for k in range(count)]


class CountingEncoder(Encoder):
    """An encoder that counts the pictures it sees, and may fail after some batches."""

    seen = 0
    batches_left = 1000

    def forward(self, pixel_values: torch.Tensor) -> Features:
        if CountingEncoder.batches_left == 0:
            raise KeyboardInterrupt
        CountingEncoder.batches_left -= 1
        CountingEncoder.seen += len(pixel_values)
        return super().forward(pixel_values)


def load(layers: list[int]) -> Encoder:
    torch.manual_seed(3)
    tower = Encoder.from_config(tiny.vision_config("dinov2"), [4], None).tower
    return CountingEncoder(tower, layers, (2, 2)).eval()


def encode(
    pictures: list[Picture], layers: tuple[int, ...] = (1, 3), **options: Any
) -> FeatureStore:
    CountingEncoder.seen, CountingEncoder.batches_left = 0, options.pop("stop_after", 1000)
    options.setdefault("batch_size", 2)
    return cached_features(partial(load, list(layers)), tiny.image_processor(), pictures, **options)


def same(one: Features, other: Features) -> bool:
    pairs = zip(one.patches + one.summary, other.patches + other.summary, strict=True)
    return one.grid == other.grid and all(torch.equal(a, b) for a, b in pairs)


def counted() -> list[int]:
    """Distinct pictures per layer, as `cache list` says."""
    said: list[str] = []
    said.extend(shards.describe())
    return [int(line.split(" pictures")[0].rsplit(" ", 1)[1]) for line in said[:-1]]


@torch.no_grad()
def test_what_is_read_is_what_the_encoder_says(tmp_path: Path) -> None:
    pictures, process = make_pictures(tmp_path), tiny.image_processor()
    store = encode([*pictures, pictures[0]])
    pixels = process([p.open() for p in pictures], return_tensors="pt")["pixel_values"]
    expected = load([1, 3])(pixels).take(torch.tensor([4, 0, 4]))
    features = store.features([pictures[4], pictures[0], pictures[4]])
    assert features.grid == (2, 2)
    assert features.layers == (1, 3)
    for a, b in zip(
        features.patches + features.summary, expected.patches + expected.summary, strict=True
    ):
        torch.testing.assert_close(a, b)
    assert store.restrict([3]).features([pictures[1]]).layers == (3,)


def test_only_what_is_missing_is_encoded(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path)
    encode(pictures, (1, 2))
    assert CountingEncoder.seen == 10
    encode(pictures, (2,))
    assert CountingEncoder.seen == 0
    encode(pictures[:4], (1, 3))
    assert CountingEncoder.seen == 4
    encode(pictures, (1, 3))
    assert CountingEncoder.seen == 6  # each layer has its own pictures
    Image.new("RGB", (40, 30), "white").save(pictures[0].name)  # other content, same name
    encode(pictures, (1, 3))
    assert CountingEncoder.seen == 2  # its batch
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(pictures[3].name).read_bytes())  # other name, same content
    encode([*pictures, Picture(str(copy))], (1, 3))
    assert CountingEncoder.seen == 0


@pytest.mark.parametrize("change", ["weights", "preprocessing", "dtype", "grid"])
def test_another_encoder_or_preprocessing_is_another_address(tmp_path: Path, change: str) -> None:
    pictures, process = make_pictures(tmp_path, 2), tiny.image_processor()
    encode(pictures)

    def changed() -> Encoder:
        encoder = load([1, 3])
        if change == "weights":
            with torch.no_grad():
                next(iter(encoder.family.blocks(encoder.tower).parameters())).mul_(1.001)
        elif change == "grid":
            encoder.token_grid = (1, 2)
        return encoder.bfloat16() if change == "dtype" else encoder

    if change == "preprocessing":
        process.image_mean = [0.4, 0.4, 0.4]
    CountingEncoder.seen = 0
    cached_features(changed, process, pictures)
    assert CountingEncoder.seen == 2


def test_stopped_and_continued_makes_the_same_bits(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = make_pictures(tmp_path)
    expected = encode(pictures).features(pictures)
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(cache, "SHARD_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        encode(pictures, stop_after=3)
    assert len(list((tmp_path / "other").rglob("*.safetensors"))) == 2 * 3
    features = encode(pictures).features(pictures)
    assert CountingEncoder.seen == 4
    assert same(features, expected)


def test_a_file_cut_anywhere_counts_as_missing(tmp_path: Path, home: Path) -> None:
    pictures = make_pictures(tmp_path, 4)
    expected = encode(pictures).features(pictures)
    file = next(home.rglob("*.safetensors"))
    whole = file.read_bytes()
    for length in range(0, len(whole), 97):
        file.with_suffix(".tmp").write_bytes(whole[:length])  # what a killed writer leaves
        file.write_bytes(whole[:length])
        assert same(encode(pictures).features(pictures), expected), length
        assert not list(home.rglob("*.tmp"))
        for later in file.parent.glob("*.safetensors"):
            later.unlink()
        file.write_bytes(whole)


def test_a_flipped_byte_is_found_and_the_entry_encoded_again(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = make_pictures(tmp_path, 4)
    expected = encode(pictures).features(pictures)
    file = next(home.rglob("*.safetensors"))
    whole = file.read_bytes()
    for at in range(0, len(whole), 61):
        caplog.clear()
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert same(encode(pictures).features(pictures), expected), at
        assert CountingEncoder.seen in (2, 4), at
        assert "damaged" in caplog.text or "cannot read" in caplog.text
        for later in file.parent.glob("*.safetensors"):
            later.unlink()
        file.write_bytes(whole)


@pytest.mark.parametrize("kind", [b"I32", b"U32"])
def test_another_type_in_the_header_is_damage(tmp_path: Path, home: Path, kind: bytes) -> None:
    pictures = make_pictures(tmp_path, 4)
    expected = encode(pictures).features(pictures)
    for file in home.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes().replace(b"F32", kind))
    assert same(encode(pictures).features(pictures), expected)


def test_a_picture_that_changes_meanwhile_is_not_stored_as_the_old_one(
    tmp_path: Path, home: Path
) -> None:
    pictures = make_pictures(tmp_path, 4)
    store = encode(pictures)
    for file in home.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    Image.new("RGB", (40, 30), "white").save(pictures[3].name)
    store.features(pictures[:3])
    with pytest.raises(LayerfuseError, match=r"3\.png changed while the study ran"):
        store.features([pictures[3]])


def test_a_cache_that_is_cleared_meanwhile_is_one_clear_error(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path, 4)
    store = encode(pictures)
    shards.clear(None)
    with pytest.raises(LayerfuseError, match="removed while in use; start the study again"):
        store.features([pictures[0]])


def test_moved_and_repaired_entries_are_found(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`cache verify` moves what is intact into another shard; another process repaired the rest."""
    pictures = make_pictures(tmp_path, 4)
    store = encode(pictures)
    expected = pickle.loads(pickle.dumps(store)).features(pictures)
    for file in home.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert len(list(shards.drop_damaged())) == 2
    encode(pictures)
    caplog.clear()
    CountingEncoder.seen = 0
    assert same(store.features(pictures), expected)
    assert CountingEncoder.seen == 0


def test_a_repair_waits_for_whoever_writes(tmp_path: Path, home: Path) -> None:
    """Whoever holds the lock removes unfinished files: they would be those of the repair."""
    pictures = make_pictures(tmp_path, 2)
    store = encode(pictures)
    for file in home.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    (lock,) = home.glob("*/.lock")
    holds, repaired = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(lock):
            holds.set()
            assert not repaired.wait(0.5)

    holder = threading.Thread(target=hold)
    holder.start()
    holds.wait()
    store.features(pictures)
    repaired.set()
    holder.join()


def test_a_batch_of_which_only_bad_pictures_are_missing_is_not_encoded(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path, 5)
    Path(pictures[0].name).write_bytes(b"no picture")
    encode(pictures)
    store = encode(pictures)
    assert list(store.bad) == [pictures[0].name]
    assert CountingEncoder.seen == 0
    processor = tiny.processor(tiny.model("single"))
    assert Collator(processor, "chat", 99, store).blank_picture() == pictures[1]


def test_who_waits_for_another_process_says_so(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = make_pictures(tmp_path, 2)
    encode(pictures)
    (lock,) = home.glob("*/.lock")
    holds = threading.Event()

    def hold() -> None:
        with FileLock(lock):
            holds.set()
            time.sleep(0.5)

    threading.Thread(target=hold).start()
    holds.wait()
    encode(pictures)
    assert "waiting for another process" in caplog.text


def test_only_what_is_missing_counts_for_the_limit(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = make_pictures(tmp_path)
    encode(pictures, (1, 3))
    held = sum(file.stat().st_size for file in home.rglob("*.safetensors"))
    monkeypatch.setenv("LAYERFUSE_CACHE_GB", f"{1.8 * held / 1e9:.9f}")
    encode(pictures, (1, 2, 3))
    monkeypatch.setenv("LAYERFUSE_CACHE_GB", "nan")
    with pytest.raises(
        LayerfuseError, match=r"\$LAYERFUSE_CACHE_GB must be a number of GB, not 'nan'"
    ):
        encode(pictures)  # all are cached, and still a mistake is named


def test_damage_while_it_is_in_use_is_repaired_in_another_process(
    tmp_path: Path, home: Path
) -> None:
    pictures = make_pictures(tmp_path, 4)
    store = encode(pictures)
    expected = store.features(pictures)
    elsewhere: FeatureStore = pickle.loads(pickle.dumps(encode(pictures)))
    for file in home.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert same(elsewhere.features(pictures), expected)
    assert same(encode(pictures).features(pictures), expected)
    assert CountingEncoder.seen == 0  # the repaired entries were kept


def write_at_once(pictures: list[Picture], begin: Barrier, seen: SimpleQueue[int]) -> None:
    """Run in a process of its own: encode when all are ready, tell how many pictures were seen."""
    begin.wait()
    encode(pictures).features(pictures)
    seen.put(CountingEncoder.seen)


def test_two_writers_at_once_encode_each_picture_once(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path)
    begin: Barrier = FORKS.Barrier(2)
    seen: SimpleQueue[int] = FORKS.SimpleQueue()
    writers = [start(write_at_once, pictures, begin, seen) for _ in range(2)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(seen.get() for _ in writers) == [0, 10]
    assert counted() == [10, 10]


def test_the_limit_is_known_before_anything_is_written(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = make_pictures(tmp_path)
    monkeypatch.setenv("LAYERFUSE_CACHE_GB", "0.000001")
    with pytest.raises(
        LayerfuseError, match=r"need .* GB beside .* allows 1e-06 GB .*`layerfuse cache cle"
    ):
        encode(pictures)
    assert not list(home.rglob("*.safetensors"))


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    pictures = make_pictures(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", full)
        with pytest.raises(LayerfuseError, match=r"cannot write .*No space left"):
            encode(pictures)
    assert [f for f in home.rglob("*") if f.is_file() and f.name != ".lock"] == []
    encode(pictures)


def test_a_full_disk_does_not_cost_what_is_intact_of_a_damaged_file(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, file: Path, **_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    encode(make_pictures(tmp_path, 4))
    file = min(home.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", full)
        with pytest.raises(LayerfuseError, match=r"cannot write .*No space left"):
            list(shards.drop_damaged())
    assert file.exists()
    said: list[str] = []
    said.extend(shards.drop_damaged())
    assert len(said) == 1
    assert said == [f"{file}: 1 damaged, 3 kept"]


def test_progress_is_told_of_every_picture_and_batch(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path, 4)
    told: list[tuple[str, int, int]] = []
    encode(pictures, progress=lambda phase, done, total, note="": told.append((phase, done, total)))
    assert told == [("encoding pictures", 1, 2), ("encoding pictures", 2, 2)]
    told.clear()
    cache.digests_of(
        pictures[:2], lambda phase, done, total, note="": told.append((phase, done, total))
    )
    assert told == [("reading pictures", 1, 2), ("reading pictures", 2, 2)]


def test_pictures_that_cannot_be_decoded_stop_or_are_named(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path, 5)
    whole = Path(pictures[3].name).read_bytes()
    Path(pictures[3].name).write_bytes(whole[: len(whole) // 2])
    store = encode(pictures)
    assert "cannot read the image" in store.bad[pictures[3].name]
    assert list(store.bad) == [pictures[3].name]
    good = [p for p in pictures if p.name not in store.bad]
    assert store.features(good).patches[0].shape[0] == 4
    assert counted() == [4, 4]


def test_list_verify_and_clear(tmp_path: Path, home: Path) -> None:
    pictures, run = make_pictures(tmp_path), CliRunner().invoke
    assert "empty" in run(app, ["cache", "list"]).output
    encode(pictures)
    listed = run(app, ["cache", "list"]).output
    assert "dinov2" in listed
    assert listed.count("float32") == 2
    assert "nothing is damaged" in run(app, ["cache", "verify"]).output
    file = sorted(home.rglob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    file.with_suffix(".tmp").write_bytes(b"left by a killed writer")
    result = run(app, ["cache", "verify"])
    assert result.exit_code == 1
    assert "1 damaged, 9 kept" in " ".join(result.output.split())
    assert run(app, ["cache", "verify"]).exit_code == 0
    assert not list(home.rglob("*.tmp"))
    encode(pictures)
    assert CountingEncoder.seen == 2
    assert run(app, ["cache", "clear", "nonsense"]).exit_code == 2
    name = next(iter(shards.layer_folders()))
    assert run(app, ["cache", "clear", name]).exit_code == 0
    assert len(counted()) == 1
    assert run(app, ["cache", "clear"]).exit_code == 0
    assert counted() == []


def test_the_cache_folder_may_be_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "file"))
    with pytest.raises(LayerfuseError, match=r"cannot make the cache folder .*file"):
        encode(make_pictures(tmp_path))
    assert os.listdir(tmp_path).count("file") == 1
