"""The runs of a study: one per arm and seed, each with a folder named by all that decides it."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfuse.config import configure
from layerfuse.encoder import load_vision_config
from layerfuse.fusion import parse
from layerfuse.recipe import Arm, Recipe
from layerfuse.selection import select

# What may change in a recipe without making a finished run a different run.
_IRRELEVANT = {"name", "description", "arms", "grid", "seeds", "baseline", "statistics"}
_IRRELEVANT |= {"keep_models", "fusion_defaults"}


@dataclass(frozen=True)
class Run:
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


def runs(recipe: Recipe) -> list[Run]:
    """Every run: first all arms with their first seed, then the second seeds, and so on."""
    settings = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in _IRRELEVANT}
    pairs = [
        (position, arm, seed)
        for arm in recipe.all_arms()
        for position, seed in enumerate(arm.seeds or recipe.seeds)
    ]
    pairs.sort(key=lambda pair: pair[0])
    return [
        Run(arm, seed, _key({**settings, "layers": arm.layers, "fusion": arm.fusion, "seed": seed}))
        for _, arm, seed in pairs
    ]


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def check_arms(recipe: Recipe, text_config: Any) -> dict[str, dict[str, Any]]:
    """Resolve every arm against the encoder's and the LLM's configuration.

    Returns {arm: {"layers", "depth", "fusion", "kind"}}. Raises ValueError naming the arm.
    """
    vision = load_vision_config(recipe.encoder.model)
    found = {}
    for arm in recipe.all_arms():
        try:
            select(arm.layers, vision.num_hidden_layers)
            config = configure(vision, text_config, arm.layers, arm.fusion, recipe.token_grid)
        except ValueError as error:
            raise ValueError(f"arm {arm.label!r}: {error}") from error
        found[arm.label] = {
            "layers": config.vision_layers,
            "depth": vision.num_hidden_layers,
            "fusion": config.fusion,
            "kind": parse(config.fusion or {})[1].kind,
        }
    return found
