"""Several processes share the feature cache: one writes, the others wait and read."""

from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import Event

import pytest

from layerfuse.vision.picture import Picture
from tests.counting_encoder import (
    CountingEncoder,
    another_holds_the_lock,
    damage_all,
    encode,
    make_pictures,
    pictures_by_layer,
)
from tests.processes import FORKS, start

pytestmark = pytest.mark.usefixtures("home")


def test_a_repair_waits_for_whoever_writes(tmp_path: Path, home: Path) -> None:
    # Whoever holds the lock removes unfinished files: they would be those of the repair.
    pictures = make_pictures(tmp_path, 2)
    store = encode(pictures)
    damage_all(home)
    repaired = Event()

    with another_holds_the_lock(home, until=repaired, seconds=0.5) as holder:
        store.features(pictures)
        repaired.set()

    # The lock was given back because its time was over, not because the repair was done.
    assert not holder.was_told


def test_who_waits_for_another_process_says_so(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = make_pictures(tmp_path, 2)
    encode(pictures)
    never = Event()

    with another_holds_the_lock(home, until=never, seconds=0.5):
        encode(pictures)

    assert "waiting for another process" in caplog.text


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

    exit_codes = [writer.exitcode for writer in writers]
    assert exit_codes == [0, 0]
    # One encoded all, the other waited and read.
    assert sorted([seen.get(), seen.get()]) == [0, 10]
    assert pictures_by_layer() == [10, 10]
