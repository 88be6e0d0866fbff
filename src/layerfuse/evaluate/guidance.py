"""Does the instruction matter? Layer weights, and tests with the guidance removed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from layerfuse.data.cache import FeatureStore
from layerfuse.data.collate import visual_inputs
from layerfuse.data.samples import Sample
from layerfuse.fusion.base import Guidance
from layerfuse.model import FusionVLM
from layerfuse.processor import IMAGE_TOKEN, Message, Processor, question_of

Control = Literal["shuffled", "mean"]
Asked = Sequence[tuple[Sample, Sequence[Message]]]
"""the sample and the conversation of each question"""


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
    model: FusionVLM,
    processor: Processor,
    asked: Asked,
    instruction: Tensor,
    store: FeatureStore | None,
    batch_size: int,
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
        notes = model.fuse(features, instruction[start + rows]).notes
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


def control_answers(
    model: FusionVLM,
    control: Control,
    instruction: Tensor,
    weights: list[list[float] | None],
    answer: Callable[[Tensor], list[str]],
) -> list[str]:
    """The answers to all questions with the guidance of a control: `answer(instruction)` asks them.

    `shuffled` gives each question the instruction of another; `mean` fixes the weights at their
    mean over the test.
    """
    if control == "shuffled":
        return answer(shuffled(instruction))
    known = torch.tensor([w for w in weights if w is not None])
    with guided_by(model, known.mean(dim=0) if len(known) else "uniform"):
        return answer(instruction)
