"""Which layers to try first: a ranked list of selections with the evidence for each."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from layerfuse.files import write_text
from layerfuse.look.output import ranking_words, validation_words
from layerfuse.look.pictures import require_look
from layerfuse.look.probe import GRID_SIDE, PROBE_FILE, RESAMPLES, bootstrap, probe
from layerfuse.look.probe_report import ProbedSelection, ProbeReport, Probes
from layerfuse.look.recommendation import RankedSelection, Recommendation
from layerfuse.look.report_file import read_report, saved_report
from layerfuse.look.similarity import FILE, look_folder, similarity
from layerfuse.look.similarity_report import LayerMeasurements, LayerScores, SimilarityReport
from layerfuse.look.tasks import task_names
from layerfuse.look.validation import trained_scores, validate
from layerfuse.recipe.reader import load_recipe
from layerfuse.vision.aspect_ratio import ImageAspectRatio
from layerfuse.vision.encoder import load_vision_config
from layerfuse.vision.layer_groups import LayerGroups
from layerfuse.vision.selection import select

SHOWN = 6
"""Selections that are printed and written as arms."""
GROUP_COUNTS = (2, 3, 4)
"""Numbers of groups whose representatives are candidates."""
PAPER_LAYERS = (3, 18, 23)
"""What the papers fuse of an encoder with `PAPER_DEPTH` blocks."""
PAPER_DEPTH = 24


@dataclass(frozen=True)
class _Looking:
    """What both measurements of an encoder share."""

    encoder: str
    """Name or folder."""
    dtype: str
    """Number type, a name in `DTYPES`."""
    image_aspect_ratio: ImageAspectRatio | None
    """What becomes of pictures that are no squares."""
    folder: Path
    """Where measurements are looked for and written."""
    console: Console


@dataclass(frozen=True)
class _Candidate:
    """A selection of layers as the probes on mean tokens see it."""

    layers: list[int]
    score: float
    """Mean over the tasks of accuracy / that of the task's best single layer."""
    accuracy: dict[str, float]
    """By task, 0..1."""
    draws: np.ndarray
    """The score on resampled test pictures, (RESAMPLES,)."""


def recommend(
    encoder: str,
    *,
    images: str | None = None,
    data: str | None = None,
    test: str | None = None,
    tasks: str | None = None,
    recipe: Path | None = None,
    against: Path | None = None,
    dtype: str = "float32",
    image_aspect_ratio: ImageAspectRatio | None = None,
    output: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Rank selections of layers by what linear probes on mean tokens read.

    Candidates are every single layer, the representatives of two to four groups, and the papers'
    layers 3, 18, 23 of 24 at this encoder's depth. Measurements in the folder are used where they
    fit and made where not. The best candidates are also written as arms of `recommended.yaml`.

    Args:
        encoder: name or folder of the encoder.
        images: pictures for `similarity`.
        data: training samples for `probe`.
        test: test samples for `probe`.
        tasks: names of tasks with commas between them; all by default.
        recipe: the recipe that `recommended.yaml` extends.
        against: the folder of a finished study, to learn how well every cheap criterion ranks its
            arms.
        dtype: number type of the encoder, a name in `DTYPES`.
        image_aspect_ratio: what becomes of pictures that are no squares, as in a recipe; None: what
            the encoder's own files say.
        output: folder of everything written; `look_folder(encoder)` by default.
        console: where tables are printed.

    Returns:
        The path of `recommend.json`.

    Raises:
        LayerfuseError: an option, a picture, the recipe or the study cannot be used.
    """
    console = console or Console()
    folder = output or look_folder(encoder)
    # Measuring takes minutes, so what can be refused is refused first
    require_look("sklearn")
    depth = load_vision_config(encoder).num_hidden_layers
    trained = _trained_selections(against, depth)
    if recipe is not None:
        load_recipe(recipe)

    looking = _Looking(encoder, dtype, image_aspect_ratio, folder, console)
    measured = _measured(looking, images)
    candidates = _candidates(measured.groups, depth)
    asked = task_names(tasks)
    # A probe measures every single layer anyway, combinations must be asked for
    combinations = [layers for layers in [*candidates, *trained] if len(layers) > 1]
    probes = _probed(looking, data, test, tasks=tasks, combinations=combinations)

    names = asked or list(probes.tasks)
    ranking = rank(
        probes.mean,
        candidates,
        names,
        scores=measured.scores,
        groups=measured.chosen_groups.groups,
        seed=probes.seed,
    )
    ranking_words(ranking[:SHOWN], console)
    validation = None
    if against is not None:
        # Saved probes may hold more tasks than are asked for now
        validation = validate(
            against, measured.scores, mean=probes.mean, grid=probes.grid, tasks=names
        )
        validation_words(validation, console)
    recommendation = Recommendation(encoder, names, ranking, validation)
    return write_recommendation(folder, recommendation, recipe, console)


def _measured(looking: _Looking, images: str | None) -> LayerMeasurements:
    """The similarity of the encoder's layers on all pictures, saved before or measured now."""
    report = saved_report(
        looking.folder / FILE,
        SimilarityReport.from_json,
        encoder=looking.encoder,
        source=images,
        dtype=looking.dtype,
        image_aspect_ratio=looking.image_aspect_ratio,
        limit=None,
    )
    if report is None:
        file = similarity(
            looking.encoder,
            images,
            dtype=looking.dtype,
            image_aspect_ratio=looking.image_aspect_ratio,
            output=looking.folder,
            console=looking.console,
        )
        # Numbers are rounded in the file; a later call, which finds it, must say the same
        report = read_report(file, SimilarityReport.from_json)
    return report.measured


def _probed(
    looking: _Looking,
    data: str | None,
    test: str | None,
    *,
    tasks: str | None,
    combinations: list[list[int]],
) -> ProbeReport:
    """Probes of all single layers and these combinations, saved before or made now."""
    report = saved_report(
        looking.folder / PROBE_FILE,
        ProbeReport.from_json,
        encoder=looking.encoder,
        source=data,
        test=test,
        dtype=looking.dtype,
        image_aspect_ratio=looking.image_aspect_ratio,
        grid_side=GRID_SIDE,
    )
    # A file of the same samples may still lack tasks or combinations
    if report is not None and _answers(report, task_names(tasks), combinations):
        return report
    file = probe(
        looking.encoder,
        data,
        test,
        tasks=tasks,
        layers=combinations,
        dtype=looking.dtype,
        image_aspect_ratio=looking.image_aspect_ratio,
        output=looking.folder,
        console=looking.console,
    )
    return read_report(file, ProbeReport.from_json)


def _trained_selections(study: Path | None, depth: int) -> list[list[int]]:
    """The selections of layers that a study trained, each of which this encoder must have."""
    selections: list[list[int]] = []
    if study is None:
        return selections
    # Layers that a study trained are probed too, so that criteria can be correlated with it
    for layers in trained_scores(study):
        # Refuses a study of a deeper encoder
        select(layers, depth)
        selections.append(list(layers))
    return selections


def _answers(
    probes: ProbeReport,
    names: list[str] | None,
    combinations: list[list[int]],
) -> bool:
    """Whether saved probes hold these tasks (None: all there are) and combinations of layers."""
    # A probe of chosen tasks does not say which others there are
    if names is None and probes.asked is not None:
        return False
    if names is not None and not set(names) <= set(probes.tasks):
        return False
    probed = [selection.layers for selection in probes.mean.selections]
    return all(layers in probed for layers in combinations)


def _candidates(groups: dict[int, LayerGroups], depth: int) -> list[list[int]]:
    """The selections to rank, each once."""
    # Layer 0, the embedding of patches, is no candidate
    selections = [[layer] for layer in range(1, depth + 1)]
    for count in GROUP_COUNTS:
        if count <= depth:
            selections.append(groups[count].representatives)

    # In a shallow encoder several of the papers' layers fall on one
    scaled = set()
    for layer in PAPER_LAYERS:
        scaled.add(max(1, round(depth * layer / PAPER_DEPTH)))
    selections.append(sorted(scaled))

    candidates = []
    for layers in selections:
        if layers not in candidates:
            candidates.append(layers)
    return candidates


def rank(
    probes: Probes,
    selections: list[list[int]],
    names: list[str],
    *,
    scores: LayerScores,
    groups: list[list[int]],
    seed: int,
) -> list[RankedSelection]:
    """Rank selections by their mean score over the tasks, fewer layers first among equals.

    Args:
        probes: on mean tokens.
        selections: those to rank; what was not probed is left out.
        names: of the tasks that count.
        scores: of each layer, as evidence.
        groups: groups of similar layers, as evidence.
        seed: of the resamples.

    Returns:
        The selections, the best first. One ties with the first where the 95 % interval of their
        difference reaches 0.
    """
    candidates = []
    for selection in probes.selections:
        if selection.layers in selections:
            candidates.append(_candidate(selection, probes, names, seed))
    candidates.sort(key=lambda candidate: (-candidate.score, len(candidate.layers)))

    best = {}
    for name in names:
        # Among the ranked, not all probed: a selection that is no candidate cannot be recommended
        best[name] = max(candidate.accuracy[name] for candidate in candidates)
    ranking = []
    for candidate in candidates:
        accuracies = list(candidate.accuracy.values())
        # All candidates were resampled alike, so that differences are between equal pictures
        difference = candidate.draws - candidates[0].draws
        low, high = np.percentile(difference, [2.5, 97.5]).tolist()
        ranking.append(
            RankedSelection(
                layers=candidate.layers,
                score=candidate.score,
                accuracy=float(np.mean(accuracies)),
                behind=[low, high],
                tie=high >= 0,
                best_on=[name for name in names if candidate.accuracy[name] == best[name]],
                groups=[group for group in groups if set(group) & set(candidate.layers)],
                entropy=scores.entropy[candidate.layers].tolist(),
                dimension=scores.dimension[candidate.layers].tolist(),
            )
        )
    return ranking


def _candidate(
    selection: ProbedSelection,
    probes: Probes,
    names: list[str],
    seed: int,
) -> _Candidate:
    """Average the scores of one probed selection over the tasks, as measured and resampled."""
    best_single = probes.best_single()
    relative = probes.relative(selection)
    accuracy = {}
    draws = np.zeros(RESAMPLES)
    for name in names:
        accuracy[name] = selection.tasks[name].accuracy
        # Where no single layer reads the task, its share is the accuracy itself
        divisor = best_single[name] or 1.0
        draws += bootstrap(selection.tasks, [name], seed) / divisor
    return _Candidate(
        layers=selection.layers,
        score=float(np.mean([relative[name] for name in names])),
        accuracy=accuracy,
        draws=draws / len(names),
    )


def write_recommendation(
    folder: Path,
    recommendation: Recommendation,
    recipe: Path | None,
    console: Console,
) -> Path:
    """Write the recommendation, and the best selections as arms of a recipe.

    Args:
        folder: gets `recommend.json` and `recommended.yaml`.
        recommendation: the content of `recommend.json`.
        recipe: the recipe that the arms extend; None: the arms alone.
        console: where the arms are printed.

    Returns:
        The path of `recommend.json`.

    Raises:
        LayerfuseError: a file cannot be written.
    """
    text = yaml.safe_dump(
        _arms(recommendation, recipe),
        sort_keys=False,
        default_flow_style=None,
    )
    console.print(text, end="", markup=False, highlight=False)
    arms = folder / "recommended.yaml"
    file = folder / "recommend.json"
    write_text(arms, text)
    write_text(file, json.dumps(recommendation.to_json()) + "\n")
    console.print(f"arms: {arms}", soft_wrap=True)
    console.print(f"recommendation: {file}", soft_wrap=True)
    return file


def _arms(recommendation: Recommendation, recipe: Path | None) -> dict[str, Any]:
    """The content of `recommended.yaml`: the best selections, each with the plainest fusion."""
    arms = []
    for selection in recommendation.ranking[:SHOWN]:
        # The plainest fusion shows the layers, not the strategy
        fusion = "single"
        if len(selection.layers) > 1:
            fusion = "concat"
        arms.append({"layers": selection.layers, "fusion": {"name": fusion}})
    # The arms and the baseline of the recipe that is extended must not stay beside these
    content: dict[str, Any] = {"arms": arms, "grid": None, "baseline": None}
    if recipe is None:
        return content

    encoder = recommendation.encoder
    # A name becomes part of a folder's name
    name = re.sub(r"[^\w.-]+", "-", f"recommended-{Path(encoder).name}")
    if Path(encoder).is_dir():
        # Paths in a recipe are relative to its own folder, not to the working directory
        encoder = str(Path(encoder).resolve())
    return {
        "extends": str(recipe.resolve()),
        "name": name,
        "encoder": encoder,
        **content,
    }
