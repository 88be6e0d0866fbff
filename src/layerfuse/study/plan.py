"""The runs of a study: one per arm and seed, each with a folder named by all that decides it."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layerfuse
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.records import RunRecord
from layerfuse.recipe.arms import Arm
from layerfuse.recipe.schema import Recipe

RESULT = "result.json"
"""A run's record; the last file that its folder gets: a run with it is finished."""

# What may change in a recipe without making a finished run a different run.
_IRRELEVANT = {
    "name",
    "description",
    "arms",
    "grid",
    "seeds",
    "auto_seeds",
    # The steps themselves are in the stage.
    "auto_steps",
    "baseline",
    "baseline_seeds",
    "claims",
    "statistics",
    "keep_models",
    "fusion_defaults",
    "chat_template",
    "similarity",
    "resources",
    "report_to",
    # A size's runs differ by their stage's `subset`.
    "data_sizes",
    "on_bad_sample",
}
# What only `layerfuse show` reads, wherever it stands in a recipe.
_ONLY_SHOWN = {"expected_samples", "config", "image_size"}
# Fields that recipes got after runs had been named by all others, wherever they stand, with their
# defaults: at these they are no part of a name, so that finished runs keep theirs. Every new field
# of a recipe that decides results belongs here.
_LATER_FIELDS = {
    "group_by": "length",
    "log_likelihood": True,
    "blocks": None,
    "start_from": None,
    "wording": "question",
    "skip": 0,
    "subset": None,
    "betas": [0.9, 0.999],
    "validation": None,
    "at": None,
    "closed_answers": False,
}


@dataclass(frozen=True)
class PlannedRun:
    """One training of one arm."""

    arm: Arm
    seed: int
    key: str
    """digest of all that decides the run's result"""
    steps: int | None = None
    """of the last stage, in a study with `steps: auto`; None where the recipe gives them"""

    @property
    def name(self) -> str:
        """How tables and messages call the run."""
        return run_name(self.arm, self.seed, self.steps)

    @property
    def folder(self) -> str:
        """The run's folder, relative to the study's."""
        return f"arms/{slug(self.arm)}.seed{self.seed}.{self.key}"

    def recipe(self, of_study: Recipe) -> Recipe:
        """The recipe by which the run is trained.

        Args:
            of_study: may have `steps: auto`.
        """
        if self.steps is None:
            return of_study
        return of_study.of_steps(self.steps)

    def result(self, study: Path) -> RunRecord | None:
        """The finished result in a study's folder, None if there is none.

        Raises:
            LayerfuseError: another version of layerfuse has written it.
        """
        file = study / self.folder / RESULT
        if not file.exists():
            return None
        try:
            return RunRecord.from_json(json.loads(file.read_text("utf-8")))
        except LayerfuseError as error:
            raise LayerfuseError(f"{file} {error}") from error


def slug(arm: Arm) -> str:
    """The arm's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", arm.label.lower()).strip("-")


def run_name(arm: Arm, seed: int, steps: int | None = None) -> str:
    """How tables and messages call a run; its steps are named where the study chooses them."""
    name = f"{arm.label} · seed {seed}"
    if steps is None:
        return name
    return f"{name} · {steps} steps"


def arms_and_seeds(recipe: Recipe) -> list[tuple[Arm, int]]:
    """The arm and the seed of every run, in the order in which they are done: all arms with their
    first seed, then the second seeds, and so on; with `seeds: auto` all that may be done."""
    arms = recipe.all_arms()
    seeds_of_arms = [arm.seeds or recipe.all_seeds for arm in arms]
    most_seeds = max(len(seeds) for seeds in seeds_of_arms)
    pairs = []
    for place in range(most_seeds):
        for arm, seeds in zip(arms, seeds_of_arms, strict=True):
            if place < len(seeds):
                pairs.append((arm, seeds[place]))
    return pairs


def budgets_of(recipe: Recipe) -> list[int | None]:
    """The steps of the last stage with which a study may train its arms, growing.

    Args:
        recipe: of the study.

    Returns:
        The budgets of `steps: auto`; None alone where the recipe gives the steps.
    """
    if recipe.step_rule is None:
        return [None]
    return [*recipe.step_rule.budgets]


def run_names(recipe: Recipe) -> list[str]:
    """How tables and messages call the runs, in their order."""
    names = []
    for steps in budgets_of(recipe):
        for arm, seed in arms_and_seeds(recipe):
            names.append(run_name(arm, seed, steps))
    return names


def first_run_names(recipe: Recipe) -> list[str]:
    """How tables and messages call the runs that a study does whatever it finds, in their order."""
    first_steps = budgets_of(recipe)[0]
    names = []
    for arm, seed in arms_and_seeds(recipe):
        if recipe.seed_rule is None or seed < recipe.seed_rule.first:
            names.append(run_name(arm, seed, first_steps))
    return names


def runs(recipe: Recipe, samples: str) -> list[PlannedRun]:
    """Every run that may be done, in the order in which they are done.

    Args:
        recipe: of the study.
        samples: a digest of what its samples hold.

    Raises:
        LayerfuseError: a file that the recipe names is missing.
    """
    planned = []
    for steps in budgets_of(recipe):
        of_budget = recipe
        if steps is not None:
            # A run has the name that a recipe with this number gives it.
            of_budget = recipe.of_steps(steps)
        common = _common_settings(of_budget, samples)
        for arm, seed in arms_and_seeds(recipe):
            decisive = {
                **common,
                "layers": _with_contents(arm.layers),
                "fusion": arm.fusion,
                "seed": seed,
            }
            text = json.dumps(decisive, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:8]
            planned.append(PlannedRun(arm, seed, key, steps))
    return planned


def _common_settings(recipe: Recipe, samples: str) -> dict[str, Any]:
    """What decides the results of all runs alike."""
    settings = _named_settings(recipe.model_dump(mode="json"))
    decisive = {name: value for name, value in settings.items() if name not in _IRRELEVANT}
    for stage in decisive["stages"].values():
        # It stood in every name until `group_by` took its place.
        stage["group_by_length"] = True
    decisive["samples"] = samples
    decisive["layerfuse"] = layerfuse.__version__
    if recipe.chat_template:
        # What the file holds, not where it is.
        decisive["template"] = _digest(recipe.chat_template)
    return decisive


def _named_settings(node: Any) -> Any:
    """A tree of mappings without what only `show` reads and without later fields at their
    defaults, at any depth."""
    if not isinstance(node, dict):
        return node
    named = {}
    for field, value in node.items():
        if field in _ONLY_SHOWN:
            continue
        if field in _LATER_FIELDS and value == _LATER_FIELDS[field]:
            continue
        named[field] = _named_settings(value)
    return named


def _with_contents(layers: Any) -> Any:
    """A selection by similarity with what its file holds instead of the file's name."""
    if not isinstance(layers, str) or "@" not in layers:
        return layers
    spec, file = layers.split("@", 1)
    return f"{spec}@{_digest(file)}"


def _digest(file: str) -> str:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise LayerfuseError(f"cannot read {file}, which the recipe names: {error}") from error
    return hashlib.sha256(content).hexdigest()
