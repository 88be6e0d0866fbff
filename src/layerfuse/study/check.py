"""Before any training: load the data, check everything, leave out bad samples."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from layerfuse.data.lazy_records import Samples
from layerfuse.data.lengths import Lengths, Limits, positions_of
from layerfuse.data.sample_sets import (
    BadSample,
    BadSamples,
    BadSets,
    SampleSets,
    label_of_validation,
)
from layerfuse.data.sources import faults, load
from layerfuse.data.subset import refuse_large_subset
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.learning_status import blind_loss
from layerfuse.evaluate.questions import asked_alone, questions
from layerfuse.hardware import device
from layerfuse.model.config import FusionConfig, configure, shapes
from layerfuse.model.given_parts import read_given_projector
from layerfuse.model.instruction import instruction_source
from layerfuse.model.pretrained import decoder_blocks, processed_size, text_config_of
from layerfuse.model.processor import Processor
from layerfuse.progress import Progress, silent
from layerfuse.recipe.schema import Recipe
from layerfuse.recipe.stage import Stage
from layerfuse.study.prompt_words import check_prompts
from layerfuse.train.arm import processor_for
from layerfuse.train.closed_answers import ClosedAnswers, labelled_tokens
from layerfuse.vision.encoder import load_vision_config

LEFT_OUT = "left_out.json"
SHIPPED = tuple(sorted(file.stem for file in (Path(__file__).parent / "accelerate").iterdir()))
SHARDED = ("fsdp2", "zero3")
"""Those that give each process a part of the weights alone."""


@dataclass(frozen=True)
class CheckedSamples:
    """The samples of a study."""

    usable: SampleSets
    """without the bad ones"""
    bad: BadSets
    tokens: dict[str, list[int]]
    """of every usable sample, of the test of every question with its answer, by the label of the
    source; with the most image tokens that an arm makes, not cut to a stage's longest"""
    blind_losses: dict[str, float | None]
    """of each stage the loss of one who does not look; None for free text"""
    configs: list[FusionConfig]
    """of the arms"""


def load_checked(recipe: Recipe, progress: Progress = silent) -> CheckedSamples:
    """Load the samples of every source and check all that can be checked without weights.

    Models, arms and templates are checked, and every conversation is encoded as training will, at
    the longest that an arm makes it.

    Args:
        recipe: what to check.
        progress: is told of the samples that are checked.

    Returns:
        The samples without the bad ones, the bad ones, the samples' lengths, and the arms'
        configurations.

    Raises:
        LayerfuseError: for what is wrong with the recipe, and with `on_bad_sample: stop` for the
            first bad sample, with their number.
    """
    configs = check_arms(recipe)
    _check_resources(recipe)
    # One for all arms: they differ in the number of image tokens alone, and a sample that fits with
    # the most of them fits every arm.
    processor = processor_for(recipe, configs[0])
    limits = Limits(
        _most_image_tokens(recipe, configs, processor),
        positions_of(configs[0].text_config),
    )
    train = {}
    tokens = {}
    bad_train = {}
    for name, stage in recipe.stages.items():
        samples = load(stage.data)
        # Pictures first: only what can be read is encoded.
        bad = _faulty(samples)
        lengths = Lengths(processor, limits, progress, phase=name)
        unusable = lengths.measure(
            samples.without(bad),
            prompt=stage.prompt,
            max_length=stage.max_length,
        )
        check_prompts(
            recipe,
            configs,
            name,
            processor=processor,
            samples=samples.without({**bad, **unusable}),
        )
        train[name] = samples
        bad_train[name] = {**bad, **unusable}
        tokens[name] = lengths.tokens
    answer_tokens = None
    if recipe.closed_answers:
        usable_train = {name: train[name].without(bad_train[name]) for name in train}
        answer_tokens = ClosedAnswers(recipe, usable_train).tokens(processor)
    everything = SampleSets(train, load(recipe.evaluate.data), _load_validation(recipe))
    bad_answered = {}
    for label, samples in everything.by_label().items():
        # Stages have been measured as they train.
        if label in train:
            continue
        lengths = Lengths(processor, limits, progress, phase=label)
        bad_answered[label] = _bad_questions(
            samples,
            lengths,
            room=recipe.evaluate.max_new_tokens,
            answer_tokens=answer_tokens,
        )
        tokens[label] = lengths.tokens
    bad_sets = BadSets(
        bad_train,
        test=bad_answered[everything.test_label],
        # None where there is none.
        validation=bad_answered.get(label_of_validation(train)),
    )
    usable = leave_out(recipe, everything, bad_sets)
    _check_claims(recipe, usable.test)
    blind_losses = {}
    for name, samples in usable.train.items():
        blind_losses[name] = blind_loss(samples, processor, recipe.stages[name].prompt)
    return CheckedSamples(usable, bad_sets, tokens, blind_losses, configs)


def _check_claims(recipe: Recipe, test: Samples) -> None:
    """Raise LayerfuseError for a claim about questions that the test does not ask."""
    about_some = [claim for claim in recipe.claims if claim.families or claim.categories]
    if not about_some:
        return
    families = set()
    categories = set()
    for question in questions(test):
        families.add(question.family)
        categories.add(question.category)
    for claim in about_some:
        for kind, named, asked in (
            ("families", claim.families, families),
            ("categories", claim.categories, categories),
        ):
            missing = sorted(set(named or []) - asked)
            if missing:
                raise LayerfuseError(
                    f"claim {claim.claim!r} is about {kind} {missing}, of which the test asks "
                    f"nothing; valid: {sorted(asked)}. `claims=[]` leaves out all claims"
                )


def _bad_questions(
    samples: Samples, lengths: Lengths, *, room: int, answer_tokens: frozenset[int] | None
) -> BadSamples:
    """The samples of a test that cannot be asked, or not be answered.

    Args:
        samples: of the test.
        lengths: measures them.
        room: tokens that an answer may have.
        answer_tokens: that answers can be made of; None for any.

    Returns:
        The samples by their own indices.
    """
    bad = _faulty(samples)
    # Nothing is cut in the test: what is asked must leave room for the answer.
    unusable = lengths.measure(
        samples.without(bad),
        prompt="chat",
        max_length=None,
        room=room,
        split=asked_alone,
    )
    bad = {**bad, **unusable}
    if answer_tokens is None:
        return bad
    processor = lengths.processor
    return {**bad, **_unanswerable(samples.without(bad), answer_tokens, processor)}


def _unanswerable(samples: Samples, tokens: frozenset[int], processor: Processor) -> BadSamples:
    """The samples of a test with an answer that no arm with closed answers could give.

    Args:
        samples: of the test, all that can be read and encoded.
        tokens: that answers can be made of.
        processor: of any arm: all label the same tokens.

    Returns:
        The samples by their own indices.
    """
    bad = {}
    for index, sample in zip(samples.order, samples, strict=True):
        for question in questions([sample]):
            other = labelled_tokens(question.with_answer(), processor, "chat") - tokens
            if other:
                words = processor.tokenizer.decode(sorted(other)[:1]).strip()
                reason = (
                    f"sample {sample.id}: with closed_answers no arm could give the answer "
                    f"{question.answer!r}, since no answer in training holds {words!r}; leave "
                    f"closed_answers out, or train on such answers {samples.place(index)}"
                )
                bad[index] = BadSample(sample.id, reason)
    return bad


def _load_validation(recipe: Recipe) -> Samples | None:
    """The samples that are answered along training; None if there are none, or never."""
    data = recipe.evaluate.validation
    if data is None or not recipe.evaluate.shares:
        return None
    return load(data)


def _most_image_tokens(recipe: Recipe, configs: list[FusionConfig], processor: Processor) -> int:
    """The largest number of tokens that an arm makes of a picture."""
    # All pictures become as large: only the image processor knows how large.
    height, width = processed_size(recipe.encoder.model, processor.image_processor)
    return max(config.num_image_tokens(height, width) for config in configs)


def _check_resources(recipe: Recipe) -> None:
    """Raise LayerfuseError, before anything is loaded, for what this machine or the batch cannot
    do."""
    resources = recipe.resources
    # Raises where the processes cannot share a stage's batch.
    for stage in recipe.stages.values():
        stage.split(resources.processes)
    if resources.accelerate is not None:
        if resources.processes == 1:
            raise LayerfuseError("resources.accelerate needs resources.processes of 2 or more")
        is_file = Path(resources.accelerate).is_file()
        if resources.accelerate not in SHIPPED and not is_file:
            raise LayerfuseError(
                f"resources.accelerate {resources.accelerate!r} is no file; valid: "
                f"{', '.join(SHIPPED)}, or an accelerate config file"
            )
        if recipe.evaluate.shares and resources.accelerate in SHARDED:
            raise LayerfuseError(
                f"evaluate.validation needs processes that hold the model whole, which "
                f"resources.accelerate {resources.accelerate!r} does not: leave one of them out"
            )
    packages: list[str] = list(recipe.report_to)
    if recipe.liger:
        packages.append("liger_kernel")
    wants_flash = recipe.attn_implementation == "flash_attention_2"
    # Without flash_attn, transformers takes the same kernels from a hub if it has this package.
    if wants_flash and find_spec("kernels") is None:
        packages.append("flash_attn")
    # Looked up, not imported: trackers and kernels take seconds to import.
    for package in packages:
        if find_spec(package) is None:
            raise LayerfuseError(f"not installed: {package}, which the recipe asks for")
    if wants_flash and device().type == "cpu":
        raise LayerfuseError(
            "attn_implementation: flash_attention_2 needs a GPU; valid on a CPU: eager, sdpa"
        )
    if recipe.liger and not torch.cuda.is_available():
        raise LayerfuseError("liger: true needs a GPU: liger's kernels are written in Triton")


def _faulty(samples: Samples) -> BadSamples:
    """The samples that cannot be read."""
    bad = {}
    for index, (sample_id, reason) in faults(samples).items():
        bad[index] = BadSample(sample_id, reason)
    return bad


def leave_out(recipe: Recipe, samples: SampleSets, bad: BadSets) -> SampleSets:
    """The samples without the bad ones.

    Args:
        recipe: says whether bad samples may be left out.
        samples: of the study.
        bad: some of them.

    Raises:
        LayerfuseError: where the recipe says stop, or where nothing or less than a stage's subset
            is left.
    """
    train = {}
    for name, part in samples.train.items():
        train[name] = _usable(recipe, name, part, bad.train[name])
    test = _usable(recipe, samples.test_label, samples.test, bad.test)
    # Known now rather than after all the training.
    if next(questions(test), None) is None:
        raise LayerfuseError("the evaluation data holds no question with an answer")
    validation = samples.validation
    if validation is not None and bad.validation is not None:
        label = label_of_validation(samples.train)
        validation = _usable(recipe, label, validation, bad.validation)
        if next(questions(validation), None) is None:
            raise LayerfuseError("evaluate.validation holds no question with an answer")
    for name, size in recipe.subsets.items():
        refuse_large_subset(name, size, len(train[name]))
    return SampleSets(train, test, validation)


def _usable(recipe: Recipe, label: str, samples: Samples, bad: BadSamples) -> Samples:
    """The samples of one source without the bad ones."""
    if not bad:
        return samples
    first = next(iter(bad.values())).reason
    if recipe.on_bad_sample == "stop":
        raise LayerfuseError(
            f"{first}; {len(bad)} of {len(samples)} samples of {label} are bad. "
            "`on_bad_sample: skip` leaves such samples out"
        )
    usable = samples.without(bad)
    if len(usable) == 0:
        raise LayerfuseError(f"no usable sample of {label} is left; the first: {first}")
    return usable


def load_remembered(recipe: Recipe, study: Path) -> SampleSets:
    """The samples of a study that another process has checked, without those that it left out.

    Args:
        recipe: of the study.
        study: its folder.
    """
    data = json.loads((study / LEFT_OUT).read_text("utf-8"))
    bad = BadSets.from_json(data, recipe.stages)
    train = {}
    for name, stage in recipe.stages.items():
        train[name] = load(stage.data).without(bad.train[name])
    test = load(recipe.evaluate.data).without(bad.test)
    validation = _load_validation(recipe)
    if validation is not None and bad.validation is not None:
        validation = validation.without(bad.validation)
    return SampleSets(train, test, validation)


def check_arms(recipe: Recipe) -> list[FusionConfig]:
    """Build every arm without weights.

    Returns:
        The configuration of every arm.

    Raises:
        LayerfuseError: naming the arm and what is valid.
    """
    vision = load_vision_config(recipe.encoder.model)
    text = text_config_of(recipe.llm.model, blocks=recipe.llm.blocks)
    configs = []
    for arm in recipe.all_arms():
        try:
            config = configure(
                vision,
                text,
                arm.layers,
                arm.fusion,
                token_grid=recipe.token_grid,
            )
            instruction_source(config.strategy).check()
            if recipe.start_from is not None:
                _check_start(recipe, config)
        except LayerfuseError as error:
            raise LayerfuseError(f"arm {arm.label!r}: {error}") from error
        configs.append(config)
    # On the meta device an LLM has its modules, but neither weights nor memory.
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text)
    # Raises for an LLM whose blocks no strategy could inject into.
    decoder_blocks(llm)
    for name, stage in recipe.stages.items():
        _check_adapters(name, stage, llm)
    return configs


def _check_start(recipe: Recipe, config: FusionConfig) -> None:
    """Raise LayerfuseError if an arm cannot begin as the model of `start_from`."""
    surroundings = shapes(config.selection, config.vision_config, config.text_config)
    config.strategy.build(surroundings).begin_as(read_given_projector(recipe.encoder.model))


def _check_adapters(name: str, stage: Stage, llm: nn.Module) -> None:
    """Raise LayerfuseError if the LLM lacks layers that adapters shall be added to."""
    if stage.lora is None or not isinstance(stage.lora.target_modules, list):
        return
    linear = set()
    for path, module in llm.named_modules():
        if isinstance(module, nn.Linear):
            # PEFT matches the last part of a module's name.
            linear.add(path.split(".")[-1])
    missing = sorted(set(stage.lora.target_modules) - linear)
    if missing:
        raise LayerfuseError(
            f"stage {name!r}: the LLM has no linear layers {missing}; valid: {sorted(linear)}"
        )
