"""Ask a model every held-out question, greedily and in batches, and score its answers."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from layerfuse.data.cache import FeatureStore
from layerfuse.data.collate import image_tokens, visual_inputs
from layerfuse.data.samples import Sample
from layerfuse.evaluate.guidance import (
    Control,
    control_answers,
    instructions,
    layer_weights,
)
from layerfuse.model import FusionVLM
from layerfuse.processor import IMAGE_TOKEN, Message, Processor

Progress = Callable[[int, int], None]


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
        pairs = [
            (a, b) for a, b in pairwise(turns) if a["role"] == "user" and b["role"] == "assistant"
        ]
        for k, (asked, answered) in enumerate(pairs):
            text = asked["content"]
            if IMAGE_TOKEN not in text and sample.pictures:
                text = IMAGE_TOKEN * len(sample.pictures) + "\n" + text
            elif text.count(IMAGE_TOKEN) != len(sample.pictures):
                bare = text.replace(IMAGE_TOKEN, "").strip()
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
    *,
    batch_size: int,
    max_new_tokens: int,
    controls: Sequence[Control] = (),
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """The model's greedy answer to every question, as rows of `predictions.jsonl`.

    Rows of guided strategies also hold the layer weights, and the answers under each control.
    """
    asked = list(questions(samples))
    store = store and store.restrict(model.vision_tower.layers)
    conversations = [(q.sample, q.messages) for q in asked]
    guide = instructions(model, processor, conversations)
    passes = 1 + (len(controls) if guide is not None else 0)
    done = 0

    def answer(instruction: Tensor | None) -> list[str]:
        nonlocal done
        found: list[str] = []
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            own = None if instruction is None else instruction[start : start + batch_size]
            found += _answer(model, processor, batch, store, max_new_tokens, own)
            done += len(batch)
            progress(done, passes * len(asked))
        return found

    rows = [_row(q, text) for q, text in zip(asked, answer(guide), strict=True)]
    if guide is not None:
        weights = layer_weights(model, processor, conversations, guide, store, batch_size)
        for row, w in zip(rows, weights, strict=True):
            row["weights"] = w and [round(x, 5) for x in w]
            row["controls"] = {}
        same = bool((guide == guide[:1]).all())
        for control in controls:
            if control == "shuffled" and same:
                continue  # one question for all pictures: there is no other instruction
            answers = control_answers(model, control, guide, weights, answer)
            for row, text in zip(rows, answers, strict=True):
                correct = exact_match(text, row["answer"])
                row["controls"][control] = {"prediction": text, "correct": correct}
    return rows


def _answer(
    model: Any,
    processor: Processor,
    batch: Sequence[Question],
    store: FeatureStore | None,
    max_new_tokens: int,
    instruction: Tensor | None,
) -> list[str]:
    visual = visual_inputs(processor, [q.sample for q in batch], store)
    expanded = processor.image_token * image_tokens(processor, visual)
    texts = [processor.prompt(list(q.messages)).replace(IMAGE_TOKEN, expanded) for q in batch]
    tokens = processor.tokenizer(
        texts, add_special_tokens=False, padding=True, return_tensors="pt"
    ).to(model.device)
    if visual and instruction is not None:
        visual["instruction"] = instruction
    visual = {name: value.to(model.device) for name, value in visual.items()}
    output = model.generate(
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        **visual,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    new = output[:, tokens["input_ids"].shape[1] :]
    return [
        text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    ]


def _row(question: Question, prediction: str) -> dict[str, Any]:
    pictures = question.sample.pictures
    return {
        "id": question.id,
        "sample": question.sample.id,
        "image": pictures[0].name if pictures and pictures[0].data is None else None,
        "question": question.messages[-1]["content"].replace(IMAGE_TOKEN, "").strip(),
        "answer": question.answer,
        "prediction": prediction,
        "correct": exact_match(prediction, question.answer),
        "family": question.family,
        "category": question.category,
        "novel": question.sample.novel,
    }


def normalize(text: str) -> str:
    """Lower case, single spaces, no full stop, comma or quotes at the ends."""
    return " ".join(text.lower().split()).strip(" .,!'\"")


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the two are the same after `normalize`."""
    return normalize(prediction) == normalize(answer)


def scores(predictions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Exact-match accuracy per family and category, of seen and novel samples, and `mean`, the
    average over families (each counts the same)."""
    by: dict[str, dict[str, list[bool]]] = {
        "families": defaultdict(list),
        "categories": defaultdict(list),
        "novelty": defaultdict(list),
    }
    for row in predictions:
        by["families"][row["family"]].append(row["correct"])
        by["categories"][row["category"]].append(row["correct"])
        by["novelty"]["novel" if row["novel"] else "seen"].append(row["correct"])
    means = {
        kind: {name: sum(hits) / len(hits) for name, hits in groups.items()}
        for kind, groups in by.items()
    }
    families = means["families"]
    return {
        "mean": sum(families.values()) / len(families),
        "families": families,
        "categories": means["categories"],
        **means["novelty"],
    }
