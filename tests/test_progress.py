"""What long work prints where nothing can be redrawn, such as in a log file."""

import io
import re

import pytest
from rich.console import Console

from layerfuse import progress
from layerfuse.progress import ProgressLines, duration, shown_progress


class Clock:
    """A clock that a test turns, in the place of `time.monotonic`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def file() -> io.StringIO:
    """Where a console prints that is no terminal."""
    return io.StringIO()


def lines_of(file: io.StringIO) -> list[str]:
    """What was printed, without the time of day."""
    lines = []
    for line in file.getvalue().splitlines():
        assert re.match(r"\d\d:\d\d:\d\d  ", line)
        lines.append(line[10:])
    return lines


def test_a_phase_says_every_half_minute_how_far_it_is(clock: Clock, file: io.StringIO) -> None:
    with shown_progress(Console(file=file, width=20)) as show:
        for done in range(200):
            # A picture a second.
            show("encoding pictures", done, 200, "note")
            clock.now += 1
        show("probing", 0, 5)

    assert lines_of(file) == [
        "encoding pictures (200)",
        "encoding pictures 30/200, about 3 min left, note",
        "encoding pictures 60/200, about 2 min left, note",
        "encoding pictures 90/200, about 2 min left, note",
        "encoding pictures 120/200, about 80 s left, note",
        "encoding pictures 150/200, about 50 s left, note",
        "encoding pictures 180/200, about 20 s left, note",
        "probing (5)",
    ]


def test_time_left_does_not_count_what_an_earlier_pass_has_done(
    clock: Clock, file: io.StringIO
) -> None:
    lines = ProgressLines(Console(file=file))

    lines.report("looking", 900, 1000)
    clock.now += 40
    lines.report("looking", 910, 1000)

    # Ten in 40 s, and 90 are left; not 910 in 40 s.
    assert lines_of(file)[-1] == "looking 910/1000, about 6 min left"


def test_jobs_side_by_side_have_phases_of_their_own(clock: Clock, file: io.StringIO) -> None:
    lines = ProgressLines(Console(file=file))

    lines.report("align", 0, 10, job="one")
    lines.report("align", 0, 10, job="two")
    clock.now += 31
    lines.report("align", 5, 10, job="one")
    lines.report("evaluate", 0, 4, job="two")

    assert lines_of(file) == [
        "one: align (10)",
        "two: align (10)",
        "one: align 5/10, about 31 s left",
        "two: evaluate (4)",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "about 0 s"), (89, "about 89 s"), (150, "about 2 min"), (9000, "about 2.5 h")],
)
def test_durations_are_in_units_that_people_count_in(seconds: float, text: str) -> None:
    assert duration(seconds) == text
