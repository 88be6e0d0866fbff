"""How likely the right answers are to a model, each question asked as the test asks it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerfuse.data.collate import Collator, image_tokens
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.nan_logits import refuse_nan
from layerfuse.evaluate.near_ties import reach
from layerfuse.evaluate.questions import Question
from layerfuse.fusion import Guidance
from layerfuse.model.loss import next_tokens
from layerfuse.model.processor import IGNORED
from layerfuse.progress import Progress, silent


@dataclass(frozen=True)
class AnswerLikelihood:
    """How likely one right answer is to a model.

    Attributes:
        total: log-probability of the whole answer, its end included, in nats.
        tokens: of the answer, its end among them.
        greedy: whether each of them is the likeliest where it stands, behind the prompt that
            generation starts from: greedy decoding then gives this answer and ends.
        too_close: whether one of them might be the likeliest, or not, in another batch.
        reach: how far another batch may move the total, in nats.
    """

    total: float
    tokens: int
    greedy: bool
    too_close: bool = False
    reach: float = 0.0

    @property
    def mean(self) -> float:
        """Log-probability of a token, in nats."""
        return self.total / self.tokens


@torch.inference_mode()
def answer_likelihoods(
    answerer: Answerer,
    asked: Sequence[Question],
    *,
    batch_size: int,
    instruction: Tensor | None = None,
    guidance: Guidance = "instruction",
    keep_impossible: bool = False,
    progress: Progress = silent,
) -> list[AnswerLikelihood]:
    """Measure log p(right answer | pictures, question): one forward a batch, nothing is generated.

    Args:
        answerer: the model.
        asked: the questions with their right answers.
        batch_size: questions at once.
        instruction: (questions, E), what guides; None computes it where the guidance needs it.
        guidance: what weighs the layers of guided strategies.
        keep_impossible: whether an answer that a model with closed answers cannot give has a
            log-probability of minus infinity; else it is an error.
        progress: told of every batch.

    Returns:
        One likelihood a question, in their order.

    Raises:
        LayerfuseError: naming a sample that cannot be asked, or not be answered by a model with a
            closed set of answers.
    """
    if instruction is None and guidance == "instruction":
        # By the model's own count an answer that stands in the row would guide as well.
        instruction = answerer.instructions(asked)
    collator = Collator(
        answerer.processor,
        "chat",
        # Questions that are too long for the LLM were refused before.
        max_length=sys.maxsize,
        store=answerer.store,
        # Rows are alike with any guidance: each holds one answer.
        guidance="uniform",
    )
    likelihoods: list[AnswerLikelihood] = []
    for start in range(0, len(asked), batch_size):
        questions = asked[start : start + batch_size]
        inputs = collator([question.with_answer() for question in questions])
        inputs["guidance"] = guidance
        if instruction is not None:
            inputs["instruction"] = instruction[start : start + batch_size]
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                inputs[name] = value.to(answerer.model.device)
        # Not given to the model, which would compute logits at every position.
        targets = next_tokens(inputs.pop("labels"))
        same_prompt = _starts_as_generation(answerer, questions, inputs, targets)
        found = _batch_likelihoods(answerer, inputs, targets, same_prompt)
        for question, likelihood in zip(questions, found, strict=True):
            if isinf(likelihood.total) and not keep_impossible:
                raise LayerfuseError(
                    f"sample {question.sample.id}: the model cannot give the answer "
                    f"{question.answer!r}: it was trained with closed_answers, and no answer in "
                    "its training holds these tokens; ask it about what it was trained for"
                )
        likelihoods += found
        progress("evaluate", len(likelihoods), len(asked))
    return likelihoods


def _starts_as_generation(
    answerer: Answerer, questions: Sequence[Question], inputs: dict[str, Any], targets: Tensor
) -> list[bool]:
    """Whether the tokens before each answer are those that generation starts from: a tokenizer may
    merge the end of a prompt with what follows it.

    Args:
        answerer: the model.
        questions: of the rows.
        inputs: keyword arguments of the model, of rows that hold the answers.
        targets: (rows, T) the next token of each position, -100 where it is not compared.
    """
    prompts = answerer.processor.text_inputs(
        [question.messages for question in questions],
        image_tokens(answerer.processor, inputs),
    )
    same: list[bool] = []
    for row in range(len(questions)):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        # The first position that is compared is the last one of the prompt.
        end = int((targets[row] != IGNORED).nonzero()[0]) + 1
        same.append(torch.equal(inputs["input_ids"][row, :end].cpu(), prompt))
    return same


def _batch_likelihoods(
    answerer: Answerer, inputs: dict[str, Any], targets: Tensor, same_prompt: Sequence[bool]
) -> list[AnswerLikelihood]:
    """The likelihoods of the rows of a batch.

    Args:
        answerer: the model.
        inputs: keyword arguments of the model.
        targets: (rows, T) the next token of each position, -100 where it is not compared.
        same_prompt: whether each row starts as generation does.
    """
    compared = targets != IGNORED
    output = answerer.model(**inputs, logits_to_keep=compared, use_cache=False)
    # (compared tokens, vocabulary) -> (compared tokens,); bfloat16 is too coarse for a logarithm
    logits = output.logits.float()
    log_probabilities = -F.cross_entropy(logits, targets[compared], reduction="none")
    refuse_nan(log_probabilities)
    rows, _ = compared.nonzero(as_tuple=True)
    totals = log_probabilities.new_zeros(len(targets))
    totals.index_add_(0, rows, log_probabilities)
    of_tokens = reach(logits, answerer.logits_dtype)
    best, second = logits.topk(2).values.unbind(dim=1)
    reaches = torch.zeros_like(totals).index_add_(0, rows, of_tokens)
    tokens = compared.sum(dim=1)
    likeliest = torch.zeros_like(tokens)
    likeliest.index_add_(0, rows, (logits.argmax(dim=1) == targets[compared]).to(tokens.dtype))
    too_close = torch.zeros_like(tokens)
    too_close.index_add_(0, rows, (best - second <= of_tokens).to(tokens.dtype))
    likelihoods: list[AnswerLikelihood] = []
    # Any: torch does not type lists of a tensor's values
    of_rows: Any = torch.stack([tokens, likeliest, too_close], dim=1)
    of_totals: Any = torch.stack([totals, reaches], dim=1)
    for (total, moved), (count, hits, close), same in zip(
        of_totals.tolist(), of_rows.tolist(), same_prompt, strict=True
    ):
        is_greedy = same and hits == count
        likelihoods.append(AnswerLikelihood(total, count, is_greedy, close > 0, moved))
    return likelihoods
