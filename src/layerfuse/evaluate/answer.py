"""Ask a model every held-out question, greedily and in batches, and score its answers; guided
strategies also without their guidance: does the instruction matter?"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerfuse.data.collate import image_tokens, visual_inputs
from layerfuse.data.feature_store import FeatureStore
from layerfuse.data.sample import Sample
from layerfuse.evaluate.metrics import exact_match
from layerfuse.fusion.base import Fusion, Guidance
from layerfuse.model.processor import IMAGE_TOKEN, Message, Processor, question_of
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.schema import Evaluation

Progress = Callable[[int, int], None]
Asked = Sequence[tuple[Sample, Sequence[Message]]]
"""the sample and the conversation of each question"""


@dataclass(frozen=True)
class Question:
    """One question to ask on its own, and the answer to expect."""

    id: str
    sample: Sample
    messages: tuple[Message, ...]
    answer: str
    family: str
    category: str


def questions(samples: Sequence[Sample]) -> Iterator[Question]:
    """Every answered turn of every sample, each with all the sample's pictures in front of it."""
    asked_of: Counter[str] = Counter()  # several samples may have one id
    for sample in samples:
        system = tuple(m for m in sample.messages if m["role"] == "system")
        turns = [m for m in sample.messages if m["role"] != "system"]
        both = ("user", "assistant")
        pairs = [(a, b) for a, b in pairwise(turns) if (a["role"], b["role"]) == both]
        for k, (asked, answered) in enumerate(pairs):
            text = asked["content"]
            if text.count(IMAGE_TOKEN) != len(sample.pictures):
                bare = text.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in text else text
                text = IMAGE_TOKEN * len(sample.pictures) + "\n" + bare
            yield Question(
                f"{sample.id}/{asked_of[sample.id]}",
                sample,
                (*system, {"role": "user", "content": text}),
                answered["content"].strip(),
                sample.families[k] if sample.families else "all",
                sample.categories[k] if sample.categories else "all",
            )
            asked_of[sample.id] += 1


@torch.inference_mode()
def predict(
    model: FusionVLM,
    processor: Processor,
    samples: Sequence[Sample],
    store: FeatureStore | None,
    how: Evaluation,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """The model's greedy answer to every question, as rows of `predictions.jsonl`.

    Rows of guided strategies also hold the layer weights, and the answers under each control.
    """
    asked = list(questions(samples))
    store = store and store.restrict(model.vision_tower.layers)
    conversations = [(q.sample, q.messages) for q in asked]
    guide = instructions(model, processor, conversations)
    controls = how.controls if guide is not None else ()
    done = 0

    def answer(instruction: Tensor | None) -> list[str]:
        nonlocal done
        found: list[str] = []
        for start in range(0, len(asked), how.batch_size):
            part = slice(start, start + how.batch_size)
            own = None if instruction is None else instruction[part]
            found += _answer(model, processor, asked[part], store, how.max_new_tokens, own)
            done += len(asked[part])
            progress(done, (1 + len(controls)) * len(asked))
        return found

    rows = [_row(q, text) for q, text in zip(asked, answer(guide), strict=True)]
    if guide is not None:
        weights = layer_weights(model, processor, conversations, guide, store, how.batch_size)
        for row, w in zip(rows, weights, strict=True):
            row["weights"] = w and [round(x, 5) for x in w]
            row["controls"] = {}
        for control in controls:
            if control == "shuffled" and (guide == guide[:1]).all():
                continue  # one question for all pictures: there is no other instruction
            instruction, guidance = controlled(model.fusion, control, guide, weights)
            with guided_by(model, guidance):
                answers = answer(instruction)
            for row, text in zip(rows, answers, strict=True):
                correct = exact_match(text, row["answer"])
                row["controls"][control] = {"prediction": text, "correct": correct}
    return rows


def _answer(
    model: Any, processor: Processor, batch: list[Question], store: Any, most: int, guide: Any
) -> list[str]:
    visual = visual_inputs(processor, [q.sample for q in batch], store)
    expanded = processor.image_token * image_tokens(processor, visual)
    texts = [processor.prompt(list(q.messages)).replace(IMAGE_TOKEN, expanded) for q in batch]
    how: dict[str, Any] = {"add_special_tokens": False, "padding": True, "return_tensors": "pt"}
    tokens = processor.tokenizer(texts, **how).to(model.device)
    if visual and guide is not None:
        visual["instruction"] = guide
    given = {name: value.to(model.device) for name, value in visual.items()}
    given |= {name: tokens[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**given, max_new_tokens=most, do_sample=False)
    new = output[:, tokens["input_ids"].shape[1] :]
    said = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in said]


def _row(question: Question, prediction: str) -> dict[str, Any]:
    pictures = question.sample.pictures
    row: dict[str, Any] = {"id": question.id, "sample": question.sample.id}
    row["image"] = pictures[0].name if pictures and pictures[0].reader is None else None
    row |= {"question": question_of(question.messages), "answer": question.answer}
    row |= {"prediction": prediction, "correct": exact_match(prediction, question.answer)}
    row |= {"family": question.family, "category": question.category}
    return {**row, "novel": question.sample.novel}


@torch.inference_mode()
def instructions(model: FusionVLM, processor: Processor, asked: Asked) -> Tensor | None:
    """(questions, E): what guides each question, or None if the strategy reads nothing."""
    if model.fusion.reads == "sentence":
        return processor.sentences([question_of(messages) for _, messages in asked])
    if model.fusion.reads == "nothing":
        return None
    found = []
    for _, messages in asked:  # one by one: no padding, and an embedding look-up costs nothing
        text = processor.prompt(list(messages)).replace(IMAGE_TOKEN, processor.image_token)
        tokens = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        found.append(model.prompt_embedding(tokens["input_ids"].to(model.device)).cpu())
    return torch.cat(found)


def shuffled(instruction: Tensor, seed: int = 0) -> Tensor:
    """Each row's instruction replaced by that of a random row with another instruction.

    Raises ValueError if all rows have the same.
    """
    kind = torch.unique(instruction, dim=0, return_inverse=True)[1].numpy()
    if len(set(kind)) < 2:
        raise ValueError("all questions have the same instruction: there is nothing to shuffle")
    rng = np.random.default_rng(seed)
    others = {k: np.flatnonzero(kind != k) for k in set(kind)}
    return instruction[torch.tensor([int(rng.choice(others[k])) for k in kind])]


@torch.inference_mode()
def layer_weights(
    model: FusionVLM, processor: Processor, asked: Asked, guide: Tensor, store: Any, batch_size: int
) -> list[list[float] | None]:
    """The weights over layers or groups of each question (the mean over its pictures), or None for
    a question without a picture."""
    found: list[list[float] | None] = []
    for start in range(0, len(asked), batch_size):
        batch = [sample for sample, _ in asked[start : start + batch_size]]
        pictures = [len(sample.pictures) for sample in batch]
        visual = visual_inputs(processor, batch, store)
        if not visual:
            found += [None] * len(batch)
            continue
        features = visual.get("features")
        if features is None:
            features = model.encode_images(visual["pixel_values"].to(model.device))
        rows = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(pictures))
        notes = model.fuse(features, guide[start + rows]).notes
        for weights in notes["weights"].float().cpu().split(pictures):
            found.append(weights.mean(dim=0).tolist() if len(weights) else None)
    return found


@contextmanager
def guided_by(model: FusionVLM, guidance: Guidance) -> Iterator[None]:
    """Inside, the strategy's weights come from `guidance`."""
    before, model.fusion.guidance = model.fusion.guidance, guidance
    try:
        yield
    finally:
        model.fusion.guidance = before


def controlled(
    fusion: Fusion, control: str, instruction: Tensor, weights: list[list[float] | None]
) -> tuple[Tensor, Guidance]:
    """What guides all questions under a control: `shuffled` gives each the instruction of another,
    `mean` fixes the weights at their mean over the test."""
    if control == "shuffled":
        return shuffled(instruction), fusion.guidance
    known = torch.tensor([w for w in weights if w is not None])
    return instruction, known.mean(dim=0) if len(known) else "uniform"
