"""Answers that do not depend on the batch: what is too close to call is asked again alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerfuse.data.sample import Sample
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.answer_folder import AskedModel
from layerfuse.evaluate.asking import answer_folder
from layerfuse.evaluate.benchmarks import BENCHMARKS
from layerfuse.evaluate.candidates import choose, possible_answers
from layerfuse.evaluate.likelihood import answer_likelihoods
from layerfuse.evaluate.near_ties import ROUNDINGS, NearTies, by_itself, reach
from layerfuse.evaluate.questions import Question
from layerfuse.evaluate.suites import Prompt
from layerfuse.model.chat_template import IMAGE_TOKEN
from layerfuse.vision.picture import Picture
from tests import tiny
from tests.made_up_benchmarks import write_picture, write_scienceqa

EPS = 2.0**-7
"""of bfloat16"""
END, PAD = 2, 0


# The rule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_reach_is_some_roundings_of_the_highest_logit(dtype: torch.dtype) -> None:
    """Or of its distance from the mean of what can be said, where that is larger."""
    logits = torch.tensor([[8.0, 6.0, 4.0], [0.5, -11.5, -11.5], [1.0, -2.0, -torch.inf]])
    one = ROUNDINGS * torch.finfo(dtype).eps
    assert reach(logits, dtype).tolist() == pytest.approx([8 * one, 8 * one, 1.5 * one])


def rows_of(steps: list[Tensor], said: list[list[int]], ends: set[int]) -> list[int]:
    """The rows that are too close, by the logits (rows, vocabulary) of some steps, and what each
    row has said."""
    near_ties = NearTies(torch.bfloat16, ends)
    prompt = torch.full((len(said), 3), END)
    for number, logits in enumerate(steps):
        so_far = torch.tensor([row[:number] for row in said], dtype=torch.long)
        input_ids = torch.cat([prompt, so_far.view(len(said), number)], dim=1)
        assert near_ties(input_ids, logits) is logits
    return near_ties.rows()


def test_rows_count_to_the_end_of_their_answer() -> None:
    clear = torch.tensor([1.0, 0.0, 0.5])
    close = torch.tensor([1.0, 1.0 - ROUNDINGS * EPS, 0.5])
    beyond = torch.tensor([1.0, 1.0 - 1.1 * ROUNDINGS * EPS, 0.5])
    # by row: never close, close at the end's own step, close behind the end, and just not close
    steps = [
        torch.stack([clear, clear, clear, beyond]),
        torch.stack([clear, close, clear, beyond]),
        torch.stack([clear, clear, close, beyond]),
    ]
    said = [[5, 5, 5], [5, END, PAD], [5, END, PAD], [5, 5, 5]]
    assert rows_of(steps, said, {END, PAD}) == [1]
    assert rows_of(steps, said, {END + 7}) == [1, 2]
    assert rows_of([], said, {END}) == []


def test_what_cannot_be_said_is_never_close() -> None:
    alone = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert rows_of([alone], [[0]], {END}) == []


# A model whose logits move with the batch


@pytest.fixture
def asked(tmp_path: Path) -> list[Question]:
    """Questions of different lengths, so that rows are padded, about pictures of their own."""
    asked: list[Question] = []
    for number in range(8):
        write_picture(tmp_path / f"{number}.png", 25 * number)
        picture = Picture(str(tmp_path / f"{number}.png"))
        words = "Which colour has the thing in the middle?"[: 6 + 5 * number]
        messages = ({"role": "user", "content": f"{IMAGE_TOKEN}{words}"},)
        sample = Sample(str(number), (picture,), messages)
        asked.append(Question(str(number), sample, messages, "red", "colour", "colour"))
    return asked


class Rounded:
    """A hook of the head that moves logits as roundings of another batch would."""

    def __call__(self, module: Any, given: Any, logits: Tensor) -> Tensor:
        shape = torch.Generator().manual_seed(
            sum(size * 31**place for place, size in enumerate(logits.shape))
        )
        moved = torch.rand(logits.shape, generator=shape) - 0.5
        # a difference of two moves by less than half of what is looked for
        scale = 0.5 * ROUNDINGS * EPS * logits.float().amax()
        return (logits.float() + scale * moved).to(logits.dtype)


@pytest.fixture(params=["concat", "text_routed"])
def vlm(request: pytest.FixtureRequest) -> Any:
    """A random model in bfloat16 whose logits move."""
    model: Any = tiny.model(request.param, seed=3).bfloat16().eval()
    model.get_output_embeddings().register_forward_hook(Rounded())
    return model


def test_answers_do_not_depend_on_the_batch(vlm: Any, asked: list[Question]) -> None:
    as_batched = Answerer(vlm, tiny.processor(vlm))
    invariant = Answerer(vlm, tiny.processor(vlm), batch_invariant=True)

    # Not what the questions themselves would guide by, and an end beside the model's own.
    guide = invariant.instructions(asked)
    if guide is not None:
        guide = 20 * torch.randn(guide.shape, generator=torch.Generator().manual_seed(0))

    def texts(answerer: Answerer, batch_size: int) -> list[str]:
        return answerer.answer(
            asked, max_new_tokens=6, batch_size=batch_size, instruction=guide, stop=["e"]
        )

    # What is asked of the rule is not empty: without it they differ.
    assert texts(as_batched, 1) != texts(as_batched, len(asked))
    # On a CPU threads round as well.
    with by_itself():
        alone = texts(as_batched, 1)
    for batch_size in (1, 3, len(asked)):
        assert texts(invariant, batch_size) == alone
    with_cache = invariant.with_cached_features(
        picture for question in asked for picture in question.sample.pictures
    )
    for batch_size in (1, len(asked)):
        assert texts(with_cache, batch_size) == alone


@dataclass
class Ahead:
    """A hook of the head by which the right tokens are ahead of all others by `lead`."""

    right: Tensor
    lead: float

    def __call__(self, module: Any, given: Any, logits: Tensor) -> Tensor:
        said = torch.ones_like(logits).view(-1, logits.shape[-1])
        said[torch.arange(len(self.right)), self.right] += self.lead
        return said.view_as(logits)


@pytest.mark.parametrize(("lead", "too_close"), [(2 * EPS, True), (8 * EPS, False)])
def test_a_likelihood_says_where_its_tokens_are_too_close(
    asked: list[Question], lead: float, too_close: bool
) -> None:
    model: Any = tiny.model("concat").bfloat16().eval()
    processor = tiny.processor(model)
    encoded = processor.encode(list(asked[0].with_answer().messages), [16], prompt="chat")
    right = encoded["labels"][encoded["labels"] != -100]
    model.get_output_embeddings().register_forward_hook(Ahead(right, lead))

    (likelihood,) = answer_likelihoods(Answerer(model, processor), asked[:1], batch_size=1)

    assert likelihood.tokens == len(right)
    assert likelihood.greedy
    assert likelihood.too_close == too_close
    assert likelihood.reach == pytest.approx(len(right) * ROUNDINGS * EPS * (1 + lead))


def test_choices_do_not_depend_on_the_batch(vlm: Any, tmp_path: Path) -> None:
    write_scienceqa(tmp_path / "scienceqa")
    benchmark = BENCHMARKS["scienceqa"]
    items = benchmark.load(tmp_path / "scienceqa")
    possible = possible_answers(items)
    letters = {answer for answers in possible.values() for answer in answers}
    tokenizer = tiny.processor(vlm).tokenizer
    with torch.no_grad():
        for table in (vlm.get_input_embeddings().weight, vlm.get_output_embeddings().weight):
            for token in range(len(table)):
                # All letters alike: nothing but roundings decides between them.
                if tokenizer.decode([token]).strip() in letters:
                    table[token] = 0.1
    prompt = Prompt(text="{question}\n{options}", max_new_tokens=8)

    def chosen(batch_size: int, batch_invariant: bool) -> list[str]:
        answerer = Answerer(vlm, tiny.processor(vlm), batch_invariant=batch_invariant)
        place = tmp_path / f"{batch_size} {batch_invariant}"
        folder = answer_folder(place, benchmark, items, prompt, AskedModel("model", "abc"))
        choices = choose(
            answerer, benchmark, items, prompt, possible, folder, batch_size=batch_size
        )
        return [choice.chosen for choice in choices]

    with by_itself():
        alone = chosen(1, False)
    for batch_size in (1, 3, 64):
        assert chosen(batch_size, True) == alone
    assert chosen(64, False) != alone
