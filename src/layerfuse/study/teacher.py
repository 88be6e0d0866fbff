"""The trained model whose visual tokens the arms of a screening are fitted to."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer, load_answerer
from layerfuse.fusion import Strategy
from layerfuse.hardware import DTYPES
from layerfuse.model.config import FusionConfig
from layerfuse.model.pretrained import load_tokenizer, text_config_of
from layerfuse.recipe.arms import Arm
from layerfuse.recipe.schema import Recipe
from layerfuse.study.coordinate import train_and_keep
from layerfuse.study.plan import PlannedRun
from layerfuse.study.trained_files import MODEL
from layerfuse.train.refit import works_inside_llm
from layerfuse.vision.encoder import Encoder, load_tower, load_vision_config

DIGEST_CHUNK = 2**24
"""Bytes of a model's file that are read at once."""
TEXT_SETTINGS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""What tells LLMs apart whose weights were trained."""


@dataclass(frozen=True)
class ChosenTeacher:
    """Who teaches, before it is trained.

    Attributes:
        name: how tables call it: the arm's name, or the model's folder.
        arm: its layers and its strategy.
        model: the folder of a model that the user gave; None for an arm of the recipe.
    """

    name: str
    arm: Arm
    model: Path | None


@dataclass(frozen=True)
class TrainedTeacher:
    """A trained teacher.

    Attributes:
        seed: with which the arms are initialised that are fitted to it.
        model: its folder.
        digest: of what the folder holds.
    """

    seed: int
    model: Path
    digest: str


def choose_teacher(
    recipe: Recipe, configs: Sequence[FusionConfig], name: str | None
) -> ChosenTeacher:
    """Find who teaches.

    Args:
        recipe: of the study.
        configs: of its arms.
        name: an arm, or the folder of a trained model. None takes the arm that reads the most
            layers, the first of several.

    Returns:
        The teacher.

    Raises:
        LayerfuseError: there is no such teacher, it cannot teach, or it is of another encoder, LLM
            or token grid.
    """
    arms: dict[str, Arm] = {}
    able: dict[str, int] = {}
    for arm, config in zip(recipe.all_arms(), configs, strict=True):
        arms[arm.label] = arm
        if _why_no_teacher(config.strategy) is None:
            able[arm.label] = len(config.taps)
    if name is None:
        name = _widest(able)
    valid = ", ".join(repr(label) for label in able) or "none"
    if name in able:
        return ChosenTeacher(name, arms[name], None)
    if name in arms:
        place = list(arms).index(name)
        reason = _why_no_teacher(configs[place].strategy)
        raise LayerfuseError(f"{name!r} cannot teach: {reason}; arms that can: {valid}")
    if (Path(name) / "config.json").is_file():
        return _given_model(recipe, name)
    raise LayerfuseError(
        f"--teacher {name!r} is neither an arm of the recipe nor the folder of a trained model; "
        f"arms that can teach: {valid}"
    )


def _widest(able: dict[str, int]) -> str:
    """The arm that reads the most layers, among those that can teach."""
    if not able:
        raise LayerfuseError(
            "no arm of the recipe can teach: guided strategies and those that work inside the LLM "
            "have no tokens that depend on the picture alone. Add an arm such as "
            "{layers: [4, 8, 12], fusion: {name: concat}}"
        )
    # The more a teacher's tokens hold, the less of what an arm knows is lost on them.
    return max(able, key=able.__getitem__)


def _given_model(recipe: Recipe, name: str) -> ChosenTeacher:
    """The teacher in a folder that the user gave."""
    model = Path(name)
    config = _config_of(model)
    _refuse_other_models(recipe, config, name)
    reason = _why_no_teacher(config.strategy)
    if reason is not None:
        raise LayerfuseError(f"{name!r} cannot teach: {reason}")
    _refuse_other_weights(recipe, load_answerer(model), name)
    fusion: dict[str, Any] = config.fusion or {}
    arm = Arm(name=name, layers=config.vision_groups or [], fusion=fusion)
    return ChosenTeacher(name, arm, model)


def _why_no_teacher(strategy: Strategy) -> str | None:
    """Why the tokens of a strategy are no target; None where they are one."""
    if works_inside_llm(strategy.module):
        return "it works inside the LLM, so that its tokens are only a part of what the LLM reads"
    if strategy.module.reads != "nothing":
        return "it is guided, so that its tokens depend on the question too"
    return None


def _config_of(model: Path) -> FusionConfig:
    """The configuration of a trained model, before its weights are read.

    Raises:
        LayerfuseError: the folder holds none of layerfuse's models.
    """
    file = model / "config.json"
    try:
        model_type = json.loads(file.read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise LayerfuseError(f"cannot read {file}: {error}") from error
    # transformers would fill in the settings that it expects.
    if model_type != FusionConfig.model_type:
        raise LayerfuseError(f"{model} holds a model of type {model_type!r}, none of layerfuse's")
    return FusionConfig.from_pretrained(model)


def _refuse_other_models(recipe: Recipe, config: FusionConfig, name: str) -> None:
    """Raise LayerfuseError for a teacher with other models than the recipe's, as far as its
    configuration tells."""
    expected_vision = load_vision_config(recipe.encoder.model)
    expected_text = text_config_of(recipe.llm.model, blocks=recipe.llm.blocks)
    expected_grid = list(recipe.token_grid) if recipe.token_grid else None
    differences = []
    settings = ("model_type", "hidden_size", "num_hidden_layers", "patch_size")
    if _settings(config.vision_config, settings) != _settings(expected_vision, settings):
        differences.append(f"another encoder than {recipe.encoder.model}")
    if _settings(config.text_config, TEXT_SETTINGS) != _settings(expected_text, TEXT_SETTINGS):
        llm = recipe.llm.model
        if recipe.llm.blocks is not None:
            llm = f"the first {recipe.llm.blocks} blocks of {llm}"
        differences.append(f"another LLM than {llm}")
    if config.token_grid != expected_grid:
        differences.append(f"token_grid {config.token_grid}, not {expected_grid}")
    if differences:
        raise LayerfuseError(_not_this_study(name, differences))


def _settings(config: Any, names: Sequence[str]) -> list[Any]:
    """Some settings of a model of transformers."""
    settings = config.to_dict()
    return [settings.get(name) for name in names]


def _not_this_study(name: str, differences: Sequence[str]) -> str:
    return (
        f"--teacher {name!r} has {' and '.join(differences)}: its tokens mean nothing to the "
        "models of this recipe. Give an arm of the recipe, or a model of the same encoder, LLM "
        "and token grid"
    )


def trained_teachers(
    recipe: Recipe,
    chosen: ChosenTeacher,
    runs: Sequence[PlannedRun],
    *,
    study: Path,
    folder: Path,
    modules: Sequence[str],
    console: Console,
) -> list[TrainedTeacher]:
    """The trained models of a teacher, one for each seed; what is missing is trained.

    Args:
        recipe: of the study.
        chosen: who teaches.
        runs: of its arm in the study, one for each seed.
        study: the study's folder; finished runs that kept their model are taken from it.
        folder: where the others are trained.
        modules: what processes of their own must import for user strategies.
        console: where the progress of training is shown.

    Raises:
        LayerfuseError: for anything that keeps the teacher from being trained.
    """
    if chosen.model is not None:
        digest = _digest(chosen.model)
        return [TrainedTeacher(run.seed, chosen.model, digest) for run in runs]
    models: dict[int, Path] = {}
    missing = []
    for run in runs:
        model = study / run.folder / MODEL
        if run.result(study) is not None and model.is_dir():
            models[run.seed] = model
        else:
            missing.append(run.seed)
    if missing:
        arm = chosen.arm.model_copy(update={"seeds": missing})
        alone = recipe.model_copy(
            update={
                "arms": [arm],
                "grid": None,
                "baseline": arm.label,
                # They are about other arms too.
                "claims": [],
                "keep_models": "all",
            }
        )
        for trained in train_and_keep(alone, folder, modules=modules, console=console):
            models[trained.record.seed] = trained.model
    return [TrainedTeacher(run.seed, models[run.seed], _digest(models[run.seed])) for run in runs]


def _digest(model: Path) -> str:
    """A digest of a model's configuration and weights."""
    digest = hashlib.sha256()
    for file in sorted([model / "config.json", *model.glob("*.safetensors")]):
        with file.open("rb") as content:
            while chunk := content.read(DIGEST_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def load_teacher(recipe: Recipe, trained: TrainedTeacher) -> Answerer:
    """Load a trained teacher, on this process's device.

    Args:
        recipe: of the study.
        trained: one of the teacher's models.

    Raises:
        LayerfuseError: its files are damaged.
    """
    answerer = load_answerer(trained.model)
    # A saved model does not say by which kernels it was trained; it is tested by the same.
    answerer.model.language_model.set_attn_implementation(recipe.attn_implementation)
    return answerer


def _refuse_other_weights(recipe: Recipe, teacher: Answerer, name: str) -> None:
    """Raise LayerfuseError for a model of another encoder of the same shape, or whose LLM reads
    other tokens of text."""
    config = load_vision_config(recipe.encoder.model)
    tower = load_tower(recipe.encoder.model, config, DTYPES[recipe.dtype])
    own = teacher.model.vision_tower
    expected = Encoder(tower, own.layers, own.token_grid).state_dict()
    differences = []
    for key, weight in own.state_dict().items():
        if not torch.equal(weight.cpu(), expected[key].to(weight.dtype)):
            differences.append(f"other weights of the encoder than {recipe.encoder.model}")
            break
    vocabulary = load_tokenizer(recipe.llm.model, recipe.image_token).get_vocab()
    if teacher.processor.tokenizer.get_vocab() != vocabulary:
        differences.append(f"another tokenizer than {recipe.llm.model}")
    if differences:
        raise LayerfuseError(_not_this_study(name, differences))
