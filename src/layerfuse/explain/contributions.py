"""What each layer gave to an answer: how the answer changes when the layer is replaced."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import LONGEST_ANSWER, Answerer
from layerfuse.explain.reading import EncodedPrompt
from layerfuse.explain.trace import AnswerTrace
from layerfuse.fusion import Fused
from layerfuse.fusion.blocks import Standardize
from layerfuse.fusion.whitening import Whiten
from layerfuse.look.pictures import batches
from layerfuse.progress import Progress, silent
from layerfuse.vision.features import Features, concatenate
from layerfuse.vision.picture import Picture

BATCH = 16
"""pictures encoded at once for the means"""
ROWS = 8
"""prompts that the LLM reads at once: twice as many as there are layers would fill a GPU"""


@dataclass(frozen=True)
class LayerMeans:
    """What stands in for each layer when it is taken away.

    Attributes:
        patches: {layer: (D,)} the mean patch token.
        summary: {layer: (D,)} the mean summary; empty where it is not known, and left as it is.
        source: what they are means of, as a page says it.
    """

    patches: dict[int, Tensor]
    summary: dict[int, Tensor]
    source: str


@dataclass(frozen=True)
class Replacement:
    """An answer after one layer was replaced.

    Attributes:
        change: of the log-probability of the first answer, in nats; negative where the layer spoke
            for it.
        answer: what the model then answers.
        tokens_changed: norm of what changes in the visual tokens, over their norm.
        memory_changed: the same of what goes into LLM blocks, by block.
    """

    change: float
    answer: str
    tokens_changed: float
    memory_changed: dict[int, float]


@dataclass(frozen=True)
class Contribution:
    """What one layer gave to an answer.

    Attributes:
        layer: of the encoder.
        by_mean: with every patch of it replaced by the mean.
        by_zero: with every patch of it replaced by zeros.
    """

    layer: int
    by_mean: Replacement
    by_zero: Replacement


def means_of_pictures(
    answerer: Answerer, pictures: Sequence[Picture], progress: Progress = silent
) -> LayerMeans:
    """Measure the mean token of each layer.

    Args:
        answerer: the model.
        pictures: of the data set, at least one.
        progress: told of every batch.

    Returns:
        The means over all patches of all pictures.

    Raises:
        LayerfuseError: a picture cannot be read.
    """
    model = answerer.model
    layers: tuple[int, ...] = model.vision_tower.layers
    patches: dict[int, Tensor] = {}
    summary: dict[int, Tensor] = {}
    done = 0
    processors = [answerer.processor.image_processor]
    with torch.inference_mode():
        for names, [pixels] in batches(pictures, processors, BATCH):
            features = model.encode_images(pixels.to(model.device))
            for layer, tokens, summaries in zip(
                layers, features.patches, features.summary, strict=True
            ):
                # A sum of the pictures' means: all pictures have equally many patches.
                of_batch = tokens.double().mean(dim=1).sum(dim=0)
                patches[layer] = patches.get(layer, 0) + of_batch
                summary[layer] = summary.get(layer, 0) + summaries.double().sum(dim=0)
            done += len(names)
            progress("means", done, len(pictures))
    for layer in layers:
        patches[layer] = (patches[layer] / done).float()
        summary[layer] = (summary[layer] / done).float()
    return LayerMeans(patches, summary, f"{done} pictures")


def stored_means(answerer: Answerer, reading: EncodedPrompt) -> LayerMeans:
    """The means that a model knows: of its training pictures where it normalises by them.

    Args:
        answerer: the model.
        reading: the picture, whose own patches are averaged where the model stores no means.
    """
    patches: dict[int, Tensor] = {}
    from_training = True
    norms: Any = answerer.model.fusion.norms
    for layer, tokens in zip(reading.features.layers, reading.features.patches, strict=True):
        norm = norms[str(layer)]
        if isinstance(norm, Standardize | Whiten):
            patches[layer] = norm.mean.float()
        else:
            from_training = False
            patches[layer] = tokens[0].float().mean(dim=0)
    source = "the training pictures" if from_training else "this picture's own patches"
    return LayerMeans(patches, {}, source)


@torch.inference_mode()
def contributions(
    answerer: Answerer,
    reading: EncodedPrompt,
    trace: AnswerTrace,
    means: LayerMeans,
    *,
    max_new_tokens: int = LONGEST_ANSWER,
) -> list[Contribution]:
    """Replace each layer in turn, and see what becomes of the answer.

    Args:
        answerer: the model.
        reading: the question and its picture.
        trace: the answer.
        means: what stands in for each layer.
        max_new_tokens: longest answer, in tokens.

    Returns:
        One contribution a layer that the strategy reads, ascending.

    Raises:
        LayerfuseError: the means are of other layers or widths.
    """
    _check(means, reading.features)
    without = concatenate(list(_replaced(reading.features, means)))
    replacements: list[Replacement] = []
    for rows in torch.arange(len(without.patches[0])).split(ROWS):
        part = without.take(rows)
        replacements += _answers_without(
            answerer, reading, trace, part, max_new_tokens=max_new_tokens
        )
    by_layer: list[Contribution] = []
    for place, layer in enumerate(reading.features.layers):
        by_mean, by_zero = replacements[2 * place : 2 * place + 2]
        by_layer.append(Contribution(layer, by_mean, by_zero))
    return by_layer


def _answers_without(
    answerer: Answerer,
    reading: EncodedPrompt,
    trace: AnswerTrace,
    without: Features,
    *,
    max_new_tokens: int,
) -> list[Replacement]:
    """What becomes of the answer with each of some features in place of the picture's own."""
    # The picture's own features beside them: in bfloat16 another kernel, or a batch of another
    # size, rounds by as much as a layer may change.
    forced = _force_answer(answerer, reading, trace, concatenate([reading.features, without]))
    logits = forced.logits.float()
    targets = trace.tokens.expand(len(logits), -1)
    # (rows, A, vocabulary) -> (rows, vocabulary, A)
    losses = F.cross_entropy(logits.mT, targets, reduction="none").sum(dim=1)
    changes = losses[0] - losses[1:]

    # Where the same tokens are the likeliest still, greedy decoding gives the same answer.
    same = (logits.argmax(dim=-1) == targets).all(dim=1) & trace.likeliest
    answers = [trace.answer] * len(logits)
    if not same[1:].all():
        # All rows go on: not every cache can be cut to some of them.
        generated = answerer.generate(forced.going_on, max_new_tokens)
        new_answers = answerer.processor.turn_ends.answer_texts(generated)
        for row in (~same).nonzero()[:, 0].tolist():
            answers[row] = new_answers[row]

    replacements: list[Replacement] = []
    fused = forced.fused
    for row, answer in enumerate(answers[1:], start=1):
        memory_changed: dict[int, float] = {}
        for block, memory in fused.memory.items():
            memory_changed[block] = _changed(memory[0], memory[row])
        replacements.append(
            Replacement(
                change=float(changes[row - 1]),
                answer=answer,
                tokens_changed=_changed(fused.tokens[0], fused.tokens[row]),
                memory_changed=memory_changed,
            )
        )
    return replacements


@dataclass(frozen=True)
class _ForcedAnswer:
    """An answer that was said whatever the model would have said, in several rows.

    Attributes:
        logits: (rows, A, vocabulary) that choose each token of the answer.
        fused: what the strategy made of the features.
        going_on: the model's keyword arguments from which it generates an answer of its own.
    """

    logits: Tensor
    fused: Fused
    # Any: keyword arguments of the model
    going_on: dict[str, Any]


def _force_answer(
    answerer: Answerer, reading: EncodedPrompt, trace: AnswerTrace, features: Features
) -> _ForcedAnswer:
    """Let the model say an answer about other features, a row each."""
    model = answerer.model
    prompts = reading.inputs(features=features)
    ids: Tensor = prompts["input_ids"]
    if ids[0, -1] == model.config.image_token_id:
        # A picture cannot be cut apart: prompts that end in one are read again to go on.
        output = model(
            **reading.inputs(trace.tokens, features),
            use_cache=False,
            logits_to_keep=len(trace.tokens) + 1,
        )
        return _ForcedAnswer(output.logits[:, :-1], output.visual.fused, prompts)

    # The prompts are read once: what they leave in the cache serves this answer and the model's
    # own. The last token of a prompt chooses the first of the answer.
    beginnings = dict(prompts)
    for name in ("input_ids", "attention_mask"):
        beginnings[name] = prompts[name][:, :-1]
    read = model(**beginnings, use_cache=True, logits_to_keep=1)
    said = trace.tokens[:-1].expand(len(ids), -1)
    output = model(
        input_ids=torch.cat([ids[:, -1:], said], dim=1),
        past_key_values=copy.deepcopy(read.past_key_values),
        visual=read.visual,
    )
    going_on = {**prompts, "past_key_values": read.past_key_values}
    return _ForcedAnswer(output.logits, read.visual.fused, going_on)


def _check(means: LayerMeans, features: Features) -> None:
    """Raise LayerfuseError for means of another encoder."""
    for layer, tokens in zip(features.layers, features.patches, strict=True):
        if layer not in means.patches or len(means.patches[layer]) != tokens.shape[-1]:
            raise LayerfuseError(
                f"the means are not of this model's layer {layer} of {tokens.shape[-1]} channels: "
                "measure them with this model"
            )


def _replaced(features: Features, means: LayerMeans) -> Iterator[Features]:
    """The features with each layer replaced: by its mean, then by zeros."""
    for place, layer in enumerate(features.layers):
        patches = features.patches[place]
        summary = features.summary[place]
        mean = means.patches[layer].to(patches).expand_as(patches)
        mean_summary = summary
        if means.summary:
            mean_summary = means.summary[layer].to(summary).expand_as(summary)
        yield _with_layer(features, place, mean, mean_summary)
        yield _with_layer(features, place, torch.zeros_like(patches), torch.zeros_like(summary))


def _with_layer(features: Features, place: int, patches: Tensor, summary: Tensor) -> Features:
    """The features with another layer at a place."""
    all_patches = list(features.patches)
    all_summaries = list(features.summary)
    all_patches[place] = patches
    all_summaries[place] = summary
    return replace(features, patches=tuple(all_patches), summary=tuple(all_summaries))


def _changed(before: Tensor, after: Tensor) -> float:
    """Norm of what changed over the norm of what was; 0 of nothing."""
    norm = before.float().norm()
    if norm == 0:
        return 0.0
    return float((after.float() - before.float()).norm() / norm)
