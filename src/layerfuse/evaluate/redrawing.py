"""The numbers of a benchmark on redrawn pictures: what belongs together stays together."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import Benchmark, Column, Item
from layerfuse.evaluate.benchmarks.interface import JudgedItem
from layerfuse.evaluate.clusters import connected_names
from layerfuse.evaluate.suite_scores import column_of
from layerfuse.evaluate.suites import SuiteColumn
from layerfuse.progress import Progress, silent

TRIES = 1000
"""Draws in a row without a question of some column, after which there are too few pictures."""
Vector = NDArray[np.float64]


class TooFewPicturesError(LayerfuseError):
    """Redrawn pictures of a benchmark do not give its numbers."""


@dataclass(frozen=True)
class Redrawn:
    """The numbers of several runs on redrawn pictures.

    Attributes:
        values: by run and column, (resamples,).
        pictures: that were redrawn; those that share a question are one.
    """

    values: dict[str, dict[str, Vector]]
    pictures: int


def redraw(
    columns: Sequence[SuiteColumn],
    benchmark: Benchmark,
    judged: Mapping[str, Sequence[JudgedItem]],
    *,
    resamples: int,
    seed: int,
    progress: Progress = silent,
) -> Redrawn:
    """Compute the numbers of several runs on redrawn pictures, the same draws for all.

    Args:
        columns: of a suite, all of this benchmark.
        benchmark: of the answers.
        judged: the answers of each run to all its questions, in the same order.
        resamples: number of redrawn sets of pictures.
        seed: of the redrawing; benchmarks are redrawn independently of each other.
        progress: is told of the resamples.

    Returns:
        The numbers, each divided as the suite says; none where all questions hang together by
        their pictures, so that there is nothing to redraw.

    Raises:
        TooFewPicturesError: hardly any draw has all columns.
    """
    scored = {name: benchmark.scored_together(of_run) for name, of_run in judged.items()}
    of_first = next(iter(scored.values()))
    clusters = clusters_of_items(benchmark, [each.item for each in of_first])
    # Every draw would be the one cluster again, and every difference certain.
    if max(clusters) == 0:
        return Redrawn({}, 1)
    copies = {name: _Copies(of_run, clusters) for name, of_run in scored.items()}
    # By the benchmark's name, in whatever order they are compared.
    rng = np.random.default_rng([seed, zlib.crc32(benchmark.name.encode())])
    redrawn: dict[str, dict[str, list[float]]] = {}
    for name in copies:
        redrawn[name] = {column.name: [] for column in columns}
    # The same for every run, whatever its answers.
    names = _names(benchmark.redrawn_columns(of_first))
    for draw in range(resamples):
        drawn = _draw(rng, benchmark, copies, max(clusters) + 1, names)
        for name, reported in drawn.items():
            for column in columns:
                value = column_of(column, reported).value
                redrawn[name][column.name].append(value / column.divide)
        progress(f"comparing {benchmark.name}", draw + 1, resamples)
    arrays: dict[str, dict[str, Vector]] = {}
    for name, by_column in redrawn.items():
        arrays[name] = {column: np.array(values) for column, values in by_column.items()}
    return Redrawn(arrays, max(clusters) + 1)


def clusters_of_items(benchmark: Benchmark, items: Sequence[Item]) -> list[int]:
    """Number the questions by what is redrawn as a whole.

    Args:
        benchmark: of the questions.
        items: all its questions.

    Returns:
        A number from 0 for each question, the same where questions share a picture or are judged
        together, directly or over others.
    """
    shown: list[list[str]] = []
    for item in items:
        names: list[str] = []
        for picture in item.pictures:
            # Files may be missing. Pictures in a table are there once for each row, under names of
            # their own.
            name = picture.name if picture.reader is None else picture.digest()
            names.append(f"picture {name}")
        together = benchmark.redrawn_with(item)
        if together:
            names.append(f"together {together}")
        shown.append(names or [f"question {item.id}"])
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in connected_names(shown)]


def _draw(
    rng: np.random.Generator,
    benchmark: Benchmark,
    copies: Mapping[str, "_Copies"],
    count: int,
    names: set[str],
) -> dict[str, list[Column]]:
    """What the benchmark reports of each run on redrawn pictures.

    Args:
        rng: draws them.
        benchmark: of the answers.
        copies: the answers of each run.
        count: the number of clusters.
        names: of the columns that are reported on all pictures.

    Raises:
        TooFewPicturesError: hardly any draw has a question of every column.
    """
    refused: LayerfuseError | None = None
    for _ in range(TRIES):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        try:
            redrawn: dict[str, list[Column]] = {}
            for name, of_run in copies.items():
                redrawn[name] = benchmark.redrawn_columns(list(of_run.drawn(times)))
        except LayerfuseError as error:
            # Some benchmarks refuse answers to a part of their questions.
            refused = error
            continue
        # Others leave a column out, and mean over fewer of them: such a draw is drawn again.
        if all(_names(reported) == names for reported in redrawn.values()):
            return redrawn
    raise TooFewPicturesError(
        f"{benchmark.title} has too few pictures, {count}: redrawn sets of them have no question "
        "of some of its columns, so that no difference can be told from chance"
    ) from refused


def _names(columns: Sequence[Column]) -> set[str]:
    """The names of some columns."""
    return {column.name for column in columns}


class _Copies:
    """The answers of one run by cluster, repeated as often as the cluster is drawn.

    A cluster that is drawn twice is two clusters: otherwise four questions would be judged together
    where two belong together.
    """

    def __init__(self, judged: Sequence[JudgedItem], clusters: Sequence[int]) -> None:
        self.originals: dict[int, list[JudgedItem]] = {}
        for each, cluster in zip(judged, clusters, strict=True):
            self.originals.setdefault(cluster, []).append(each)
        self.copies: dict[tuple[int, int], list[JudgedItem]] = {}

    def drawn(self, times: NDArray[np.intp]) -> Iterator[JudgedItem]:
        """The answers of all clusters, each as often as it is drawn."""
        for cluster, of_cluster in self.originals.items():
            for copy in range(int(times[cluster])):
                yield from self._copy(cluster, of_cluster, copy)

    def _copy(self, cluster: int, of_cluster: list[JudgedItem], copy: int) -> list[JudgedItem]:
        if copy == 0:
            return of_cluster
        key = (cluster, copy)
        if key not in self.copies:
            renamed: list[JudgedItem] = []
            for each in of_cluster:
                together = f"{each.item.together} copy {copy}" if each.item.together else ""
                item = replace(each.item, id=f"{each.item.id} copy {copy}", together=together)
                renamed.append(replace(each, item=item))
            self.copies[key] = renamed
        return self.copies[key]
