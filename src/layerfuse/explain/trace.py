"""What each word of an answer looked at: attention over the picture, sinks told apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerfuse.evaluate.answer import LONGEST_ANSWER, Answerer
from layerfuse.explain.reading import EncodedPrompt

SINK = 5.0
"""A visual token is an attention sink if the norm of its hidden state is more than so many times
the median of all visual tokens behind some LLM block."""


@dataclass(frozen=True)
class AnswerTrace:
    """An answer, token by token.

    Attributes:
        answer: the text.
        pieces: of the answer, one a token; joined they are the answer.
        tokens: (A,) ids of the pieces, then that which ends the turn where the model ended it.
        log_probability: of those tokens, in nats.
        likeliest: whether each of them is the likeliest where it stands, so that nothing but the
            logits chose the answer.
        attention: (pieces, blocks, N') the share of its attention that each token, when it was
            chosen, gave to each visual token; the mean over heads.
        norm_ratios: (blocks, N') norm of each visual token's hidden state behind each block, over
            the median of all visual tokens there.
        cover: (N', cells) the cells of the grid that each visual token stands for.
        grid: (rows, columns)
    """

    answer: str
    pieces: list[str]
    tokens: Tensor
    log_probability: float
    likeliest: bool
    attention: Tensor
    norm_ratios: Tensor
    cover: Tensor
    grid: tuple[int, int]

    @property
    def sinks(self) -> list[int]:
        """The visual tokens with outlying norms, which draw attention whatever they show."""
        highest = self.norm_ratios.amax(dim=0)
        return [index for index, ratio in enumerate(highest) if ratio > SINK]

    def on_grid(self, without_sinks: bool = False) -> Tensor:
        """Attention over the cells of the picture.

        Args:
            without_sinks: leave out what sinks got.

        Returns:
            (pieces, blocks, rows, columns) shares of all attention; the rest went to text.
        """
        attention = self.attention
        if without_sinks:
            attention = attention.clone()
            attention[..., self.sinks] = 0
        return (attention @ self.cover).unflatten(-1, self.grid)


@torch.inference_mode()
def trace_answer(
    answerer: Answerer,
    reading: EncodedPrompt,
    max_new_tokens: int = LONGEST_ANSWER,
    generated: Tensor | None = None,
) -> AnswerTrace:
    """Answer a question, and look at what each token of the answer attended to.

    The answer is generated as ever; one more forward over prompt and answer, with attention that
    gives its weights, reads them.

    Args:
        answerer: the model.
        reading: the question and its picture.
        max_new_tokens: longest answer, in tokens.
        generated: (A,) tokens of the answer, where it is known already.

    Returns:
        The answer with its attention. LLM blocks without attention weights, such as recurrent
        ones, are left out.
    """
    model = answerer.model
    if generated is None:
        generated = answerer.generate(reading.inputs(), max_new_tokens)[0]
    answer = answerer.processor.turn_ends.answer_texts(generated[None])[0]
    pieces = answer_pieces(answerer.processor.tokenizer, generated, answer)
    # With the token behind the answer, which says that it ends there.
    tokens = generated[: len(pieces) + 1]
    with attention_weights(model.language_model):
        output = model(
            **reading.inputs(tokens),
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
            # those that choose the answer's tokens, and what follows them
            logits_to_keep=len(tokens) + 1,
        )

    # The last token of the prompt chooses the first of the answer.
    first = reading.prompt.shape[1] - 1
    choosing = slice(first, first + len(pieces))
    places = reading.image_places
    # Of an LLM whose blocks give no weights there are none.
    attention = [torch.zeros(len(pieces), 0, len(places))]
    for weights in output.attentions:
        # (1, heads, T, T) -> (heads, pieces, N') -> (pieces, 1, N')
        of_heads = weights[0, :, choosing][..., places]
        attention.append(of_heads.float().mean(dim=0).unsqueeze(1).cpu())
    logits = output.logits[0, :-1].float()
    return AnswerTrace(
        answer=answer,
        pieces=pieces,
        tokens=tokens,
        log_probability=-float(F.cross_entropy(logits, tokens, reduction="sum")),
        likeliest=bool((logits.argmax(dim=-1) == tokens).all()),
        attention=torch.cat(attention, dim=1),
        norm_ratios=_norm_ratios(output.hidden_states, places),
        cover=reading.cover,
        grid=reading.grid,
    )


def _norm_ratios(hidden_states: tuple[Tensor, ...], places: Tensor) -> Tensor:
    """(blocks, N'), norms of visual tokens behind each block over their median."""
    ratios: list[Tensor] = []
    # Before the first block norms are those that the projector makes.
    for hidden in hidden_states[1:]:
        norms = hidden[0, places].float().norm(dim=-1)
        ratios.append((norms / norms.median()).cpu())
    return torch.stack(ratios)


# Any: tokenizers of transformers share no type that says what they have
def answer_pieces(tokenizer: Any, tokens: Tensor, answer: str) -> list[str]:
    """The text that each token adds to an answer.

    Args:
        tokenizer: of the LLM.
        tokens: (A,) generated tokens; those behind the answer are left out.
        answer: their text, without what ends the turn.

    Returns:
        As many texts as tokens of the answer; joined they are the answer. A character of several
        tokens belongs to the last of them.
    """
    pieces: list[str] = []
    written = ""
    for end in range(1, len(tokens) + 1):
        if written == answer:
            break
        text: str = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        # What does not stand in the answer: half a character, or the end of the turn.
        grown = _common_beginning(answer, text.lstrip())
        pieces.append(grown[len(written) :])
        written = grown
    return pieces


def _common_beginning(answer: str, text: str) -> str:
    """The longest text that both begin with."""
    for place, (expected, character) in enumerate(zip(answer, text, strict=False)):
        if expected != character:
            return answer[:place]
    return answer[: len(text)]


# Any: causal LMs of transformers share no type that says what they have
@contextmanager
def attention_weights(language_model: Any) -> Iterator[None]:
    """Let an LLM compute its attention so that its weights can be seen, and as before afterwards.

    Args:
        language_model: a stock causal LM.
    """
    kernel: str = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(kernel)
