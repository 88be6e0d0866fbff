"""Before any training: load the data, check everything, leave out bad samples, encode pictures."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM

from layerfuse.data.feature_store import Progress
from layerfuse.data.sources import Samples, faults, load
from layerfuse.evaluate.answer import questions
from layerfuse.fusion import parse
from layerfuse.model.config import FusionConfig, configure
from layerfuse.model.instruction import instruction_source
from layerfuse.model.pretrained import decoder_blocks, text_config_of
from layerfuse.model.processor import Processor
from layerfuse.recipe.schema import Recipe, Stage
from layerfuse.train.arm import processor_for
from layerfuse.vision.encoder import load_vision_config

LEFT_OUT = "left_out.json"
SHIPPED = tuple(sorted(file.stem for file in (Path(__file__).parent / "accelerate").iterdir()))
Report = Callable[[str, int, int], None]
Bad = dict[int, tuple[str, str]]  # (id, reason) of every bad sample by its index
Faults = dict[str, Bad]  # the same per source: a stage or `evaluate`


def load_checked(recipe: Recipe, report: Report) -> tuple[dict[str, Samples], Faults]:
    """The samples of every source without the bad ones, and the bad ones.

    Models, arms and templates are checked without loading weights, every conversation is encoded as
    training will, at the longest that an arm makes it. Raises ValueError for what is wrong with the
    recipe, and with `on_bad_sample: stop` for the first bad sample, with their number.
    """
    configs = check_arms(recipe)
    _check_resources(recipe)
    processor = processor_for(recipe, configs[0])
    blank = processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")
    height, width = blank["pixel_values"].shape[-2:]
    longest = 0
    for config in configs:
        longest = max(longest, config.num_image_tokens(height, width))
    samples, bad = {}, {}
    for name, data in recipe.datasets():
        samples[name] = load(data)
        bad[name] = faults(samples[name])
        if name in recipe.stages:
            stage, whole = recipe.stages[name], samples[name].without(bad[name])
            bad[name] |= _unusable(whole, processor, stage, longest, partial(report, name))
    return leave_out(recipe, samples, bad), bad


def _check_resources(recipe: Recipe) -> None:
    """Raise ValueError, before anything is loaded, for what this machine or the batch cannot do."""
    wanted = recipe.resources
    for stage in recipe.stages.values():
        stage.split(wanted.processes)
    if wanted.accelerate is not None and wanted.processes == 1:
        raise ValueError("resources.accelerate needs resources.processes of 2 or more")
    if wanted.accelerate not in (None, *SHIPPED) and not Path(str(wanted.accelerate)).is_file():
        raise ValueError(
            f"resources.accelerate {wanted.accelerate!r} is no file; valid: {', '.join(SHIPPED)}, "
            "or an accelerate config file"
        )
    for name in [*recipe.report_to, *(["liger_kernel"] if recipe.liger else [])]:
        if find_spec(name) is None:
            raise ValueError(f"not installed: {name}, which the recipe asks for")
    if recipe.liger and not torch.cuda.is_available():
        raise ValueError("liger: true needs a GPU: liger's kernels are written in Triton")


def _unusable(
    samples: Samples, processor: Processor, stage: Stage, tokens: int, report: Progress
) -> Bad:
    found = {}
    for done, (own, sample) in enumerate(zip(samples.order, samples, strict=True), start=1):
        images = [tokens] * len(sample.pictures)
        try:
            processor.encode(list(sample.messages), images, stage.prompt, stage.max_length)
        except ValueError as error:
            found[own] = (sample.id, f"sample {sample.id}: {error}")
        if done % 1000 == 0:
            report(done, len(samples))
    return found


def leave_out(recipe: Recipe, samples: Mapping[str, Samples], bad: Faults) -> dict[str, Samples]:
    """The samples without the bad ones. Raises ValueError where the recipe says stop, or where
    nothing is left."""
    kept = {}
    for name, part in samples.items():
        found = bad.get(name, {})
        if found and recipe.on_bad_sample == "stop":
            first = next(iter(found.values()))[1]
            raise ValueError(
                f"{first}; {len(found)} of {len(part)} samples of {name} are bad. "
                "`on_bad_sample: skip` leaves such samples out"
            )
        kept[name] = part.without(found)
        if not len(kept[name]):
            first = next(iter(found.values()))[1]
            raise ValueError(f"no usable sample of {name} is left; the first: {first}")
    if next(questions(kept["evaluate"]), None) is None:
        raise ValueError("the evaluation data holds no question with an answer")
    return kept


def digest_samples(samples: Mapping[str, Samples], pictures: Mapping[str, str]) -> str:
    """A digest of all that the samples hold, `pictures` by their own digests, if they are given."""
    found = hashlib.sha256()
    for name, part in samples.items():
        for sample in part:
            shown = [pictures.get(picture.name) for picture in sample.pictures]
            found.update(repr((name, shown, replace(sample, pictures=()))).encode())
    return found.hexdigest()


def remembered(recipe: Recipe, study: Path) -> dict[str, Samples]:
    """The samples of a study that another process has checked."""
    bad: dict[str, dict[str, Any]] = json.loads((study / LEFT_OUT).read_text("utf-8"))
    return {name: load(data).without(set(map(int, bad[name]))) for name, data in recipe.datasets()}


def check_arms(recipe: Recipe) -> list[FusionConfig]:
    """Build every arm without weights. Raises ValueError naming the arm and what is valid."""
    configs = []
    vision, text = load_vision_config(recipe.encoder.model), text_config_of(recipe.llm.model)
    for arm in recipe.all_arms():
        try:
            configs.append(configure(vision, text, arm.layers, arm.fusion, recipe.token_grid))
            instruction_source(parse(arm.fusion)).check()
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
