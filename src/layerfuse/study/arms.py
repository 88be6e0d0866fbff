"""The runs of a study: one per arm and seed, each with a folder named by all that decides it."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import layerfuse
from layerfuse.config import FusionConfig, configure, decoder_blocks, text_config_of
from layerfuse.encoder import load_vision_config
from layerfuse.fusion import FUSIONS, parse
from layerfuse.recipe import Arm, Recipe
from layerfuse.sentences import SentenceEncoder

# What may change in a recipe without making a finished run a different run.
_IRRELEVANT = {"name", "description", "arms", "grid", "seeds", "baseline", "statistics"}
_IRRELEVANT |= {"keep_models", "fusion_defaults", "chat_template", "similarity", "resources"}
_IRRELEVANT |= {"report_to", "on_bad_sample"}
_ONLY_SHOWN = {"expected_samples", "config", "image_size"}


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


def runs(recipe: Recipe, samples: str) -> list[Run]:
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
            found.append((place, Run(arm, seed, key)))
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


def check_arms(recipe: Recipe) -> list[FusionConfig]:
    """Build every arm without weights. Raises ValueError naming the arm and what is valid."""
    configs = []
    vision, text = load_vision_config(recipe.encoder.model), text_config_of(recipe.llm.model)
    for arm in recipe.all_arms():
        try:
            configs.append(configure(vision, text, arm.layers, arm.fusion, recipe.token_grid))
            options: Any = parse(arm.fusion)[0]
            if FUSIONS[arm.fusion["name"]][1].reads == "sentence":
                SentenceEncoder(options.sentence_encoder, options.sentence_width).check()
        except ValueError as error:
            raise ValueError(f"arm {arm.label!r}: {error}") from error
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text)
    decoder_blocks(llm)
    linear = {n.split(".")[-1] for n, m in llm.named_modules() if isinstance(m, nn.Linear)}
    for name, stage in recipe.stages.items():
        wanted = stage.lora.target_modules if stage.lora else []
        missing = sorted(set(wanted) - linear) if isinstance(wanted, list) else []
        if missing:
            raise ValueError(
                f"stage {name!r}: the LLM has no linear layers {missing}; valid: {sorted(linear)}"
            )
    return configs
