"""The runs of a study: one per arm and seed, each with a folder named by all that decides it."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layerfuse
from layerfuse.recipe.schema import Arm, Recipe

# What may change in a recipe without making a finished run a different run.
_IRRELEVANT = {"name", "description", "arms", "grid", "seeds", "baseline", "statistics"}
_IRRELEVANT |= {"keep_models", "fusion_defaults", "chat_template", "similarity", "resources"}
_IRRELEVANT |= {"report_to", "on_bad_sample"}
_ONLY_SHOWN = {"expected_samples", "config", "image_size"}


@dataclass(frozen=True)
class PlannedRun:
    """One training of one arm."""

    arm: Arm
    seed: int
    key: str

    @property
    def name(self) -> str:
        return f"{self.arm.label} · seed {self.seed}"

    @property
    def folder(self) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", self.arm.label.lower()).strip("-")
        return f"arms/{slug}.seed{self.seed}.{self.key}"

    def result(self, study: Path) -> dict[str, Any] | None:
        """The finished result, if there is one."""
        file = study / self.folder / "result.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None


def runs(recipe: Recipe, samples: str) -> list[PlannedRun]:
    """Every run: first all arms with their first seed, then the second seeds, and so on; `samples`
    is a digest of what they hold."""
    settings = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in _IRRELEVANT}
    decides = {**_without(settings, _ONLY_SHOWN), "samples": samples}
    decides["layerfuse"] = layerfuse.__version__
    if recipe.chat_template:
        decides["template"] = _digest(recipe.chat_template)
    found = []
    for arm in recipe.all_arms():
        own = {**decides, "layers": _with_contents(arm.layers), "fusion": arm.fusion}
        for place, seed in enumerate(arm.seeds or recipe.seeds):
            text = json.dumps({**own, "seed": seed}, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:8]
            found.append((place, PlannedRun(arm, seed, key)))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _without(node: Any, keys: set[str]) -> Any:
    if not isinstance(node, dict):
        return node
    return {k: _without(v, keys) for k, v in node.items() if k not in keys}


def _with_contents(layers: Any) -> Any:
    """A selection by similarity with what its file holds instead of the file's name."""
    if not isinstance(layers, str) or "@" not in layers:
        return layers
    spec, file = layers.split("@", 1)
    return f"{spec}@{_digest(file)}"


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
