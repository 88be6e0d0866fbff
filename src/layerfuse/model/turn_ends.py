"""The end of an answer: what training labels behind it, and so where generation stops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerfuse.errors import LayerfuseError
from layerfuse.model.chat_template import ChatTemplate, Rendered, Span
from layerfuse.model.tokens import TextTokenizer, Tokens, special_ids

# How answers may close: tokenizers merge some of these with a newline behind them into one token.
_CLOSINGS = ("a", "1", ".", ",", "!", "?", ":", ";", ")", "]", "}", '"', "'", "%", "*", "`")


@dataclass(frozen=True)
class EndTokens:
    """What training labels behind an answer, and so where generation stops."""

    separate: list[int]
    """tokens that hold nothing of the answer, such as `</s>` or a newline"""
    merged: list[int]
    """tokens that hold the answer's last characters too, such as a full stop with a newline"""
    text: str
    """an end of several tokens, such as `###`, as text with the spaces before it; empty where one
    token ends answers"""
    before_token: str
    """what the template writes between an answer and the special token that ends it, such as the
    `#` of `#</s>`; mostly nothing"""

    @property
    def stop_text(self) -> str:
        """The text at which generation stops: models may leave out the spaces before it."""
        return self.text.strip(" ")

    def early_stop(self, answer: str) -> str:
        """The words of an answer at which generation would stop before all of it is said.

        Args:
            answer: what is learned.

        Returns:
            Its own part of the text that ends answers; empty where that comes behind it alone.
        """
        stop = self.stop_text
        if not stop:
            return ""
        whole = answer + self.text
        # an answer may also end with what the end itself begins with, such as `C#` before `###`
        start = whole.index(stop)
        if start >= len(answer):
            return ""
        return answer[start : start + len(stop)]


class TurnEnds:
    """Where turns end in one chat template and one tokenizer.

    Args:
        chat: the chat template.
        text_tokenizer: makes tokens of what it writes.
    """

    def __init__(self, chat: ChatTemplate, text_tokenizer: TextTokenizer) -> None:
        self.chat = chat
        self.tokenizer = chat.tokenizer
        self.text_tokenizer = text_tokenizer
        self._end_tokens: EndTokens | None = None
        self.words_after_answers = self._common_words_after_answers()
        """what the chat template writes after every answer, the last one too; often nothing but an
        end-of-turn token and a newline"""

    def end_tokens(self) -> EndTokens:
        """What ends an answer, as `encode` labels it: whatever the chat template writes there, and
        the end of sequence of the plain prompt."""
        # it takes dozens of probes, and every batch of answers asks for it
        if self._end_tokens is None:
            self._end_tokens = self._find_end_tokens()
        return self._end_tokens

    def _find_end_tokens(self) -> EndTokens:
        """What ends an answer, by what the template and the tokenizer make of probes."""
        separate: set[int] = set()
        merged: set[int] = set()
        text = ""
        before_token = ""
        named_ends = self._named_ends()
        for closing in _CLOSINGS:
            for probe in self._probes(closing):
                tokens = self.text_tokenizer.tokens(probe)
                for answer in probe.answers:
                    for span in self.token_spans(probe.text, tokens, [answer]):
                        last_token = tokens.ids[span.end - 1]
                        first, _ = tokens.offsets[span.end - 1]
                        if last_token in named_ends and first >= answer.end:
                            separate.add(last_token)
                            before_token = probe.text[answer.end : first].strip()
                            continue
                        behind = _tokens_behind(answer, probe.text, tokens, span)
                        if len(behind) > 1:
                            text = self.words_after_answers.rstrip(" ")
                        elif behind and first >= answer.end:
                            separate.add(last_token)
                        elif behind:
                            merged.add(last_token)
        if self.tokenizer.eos_token_id is not None:
            separate.add(self.tokenizer.eos_token_id)
        return EndTokens(sorted(separate), sorted(merged - separate), text, before_token)

    def ends_answers(self) -> bool:
        """Whether training labels anything behind the last answer of a conversation; if not, a
        model never learns to stop."""
        for probe in self._probes(_CLOSINGS[0]):
            tokens = self.text_tokenizer.tokens(probe)
            last_answer = probe.answers[-1]
            for span in self.token_spans(probe.text, tokens, [last_answer]):
                _, last = tokens.offsets[span.end - 1]
                if last <= last_answer.end:
                    return False
        return True

    # Any: transformers' GenerationConfig declares no types
    def set_stop_tokens(self, generation_config: Any) -> None:
        """Let generation stop where training ends an answer, and where the LLM itself stops.

        The one place that decides where answers stop. It is saved with the model.

        Args:
            generation_config: of the model; its `eos_token_id` is changed, and its `stop_strings`
                where an end is of several tokens.
        """
        stops: list[int] = []
        # transformers has a number for one token and a list for several
        of_llm = generation_config.eos_token_id
        if isinstance(of_llm, int):
            stops.append(of_llm)
        elif of_llm is not None:
            stops.extend(of_llm)
        ends = self.end_tokens()
        for token in [*ends.separate, *ends.merged]:
            if token not in stops:
                stops.append(token)
        if len(stops) == 1:
            generation_config.eos_token_id = stops[0]
        elif stops:
            generation_config.eos_token_id = stops

        texts: list[str] = []
        texts_of_llm = generation_config.stop_strings
        if isinstance(texts_of_llm, str):
            texts.append(texts_of_llm)
        elif texts_of_llm is not None:
            texts.extend(texts_of_llm)
        if ends.stop_text and ends.stop_text not in texts:
            texts.append(ends.stop_text)
        # without an end of several tokens, `generate` needs no tokenizer
        if texts:
            generation_config.stop_strings = texts

    def answer_texts(self, rows: torch.Tensor, stop: Sequence[str] = ()) -> list[str]:
        """What the model said, without the end of its turn.

        Args:
            rows: (rows, T) generated tokens, without the prompt.
            stop: texts that end an answer too.

        Returns:
            One answer per row, without spaces around it.
        """
        ends = self.end_tokens()
        # Any: torch does not type lists of a tensor's values
        generated: Any = rows
        answers: list[str] = []
        for tokens in generated.tolist():
            answer, _ = self._answer_text(tokens, ends, stop)
            answers.append(answer)
        return answers

    def unfinished_text(self, tokens: list[int]) -> str:
        """What the model has said so far, without what may yet become the end of its turn.

        Args:
            tokens: generated so far, without the prompt.

        Returns:
            The answer so far, without spaces around it.
        """
        ends = self.end_tokens()
        text, is_finished = self._answer_text(tokens, ends, ())
        if is_finished:
            return text
        # The bytes of a character may be several tokens; half of them is none.
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        for end in (ends.stop_text.strip(), ends.before_token):
            text = _without_beginning_of(end, text)
        return text.rstrip()

    def _answer_text(
        self, tokens: list[int], ends: EndTokens, stop: Sequence[str]
    ) -> tuple[str, bool]:
        """What the model said in the tokens of one row, and whether its turn has ended."""
        answer: list[int] = []
        has_end_token = False
        is_finished = False
        for token in tokens:
            # an end that is no special token would else be decoded
            if token in ends.separate:
                has_end_token = True
                break
            answer.append(token)
            if token in ends.merged:
                is_finished = True
                break
        text: str = self.tokenizer.decode(answer, skip_special_tokens=True)
        texts_that_end = list(stop)
        if ends.stop_text:
            texts_that_end.insert(0, ends.stop_text)
        # Before spaces are taken off: a newline may be what ends an answer.
        for end in texts_that_end:
            text, found, _ = text.partition(end)
            is_finished = is_finished or bool(found)
        if has_end_token:
            text = text.rstrip().removesuffix(ends.before_token)
        return text.strip(), is_finished or has_end_token

    def token_spans(self, text: str, tokens: Tokens, answers: list[Span]) -> Iterator[Span]:
        """The tokens of each answer, with those that end its turn, if any.

        Args:
            text: the conversation.
            tokens: of the conversation.
            answers: the characters of the answers.

        Yields:
            The tokens of each answer that has any.
        """
        ids = tokens.ids
        offsets = tokens.offsets
        end_tokens = self._special_ends()
        for answer in answers:
            inside: list[int] = []
            for index, (first, last) in enumerate(offsets):
                # tokens that a tokenizer adds by itself cover no character
                if first < last and first < answer.end and last > answer.start:
                    inside.append(index)
            if not inside:
                continue
            end = inside[-1] + 1
            # templates may write spaces before the end of a turn
            after = end
            while after < len(ids) and not text[slice(*offsets[after])].strip():
                after += 1
            if after < len(ids) and ids[after] in end_tokens:
                end = after + 1
            else:
                end = self._after_ordinary_end(text, tokens, answer, end)
            yield Span(inside[0], end)

    def _after_ordinary_end(self, text: str, tokens: Tokens, answer: Span, end: int) -> int:
        """Where a turn ends that no special token ends right after its answer.

        Args:
            text: the conversation.
            tokens: of the conversation.
            answer: the answer's characters.
            end: the last token of the answer + 1.

        Returns:
            The last token that is labelled + 1. It is the first special or added token of the end
            of the turn, where that begins with other characters, else the last token of that end;
            `end` where the template ends no turn.
        """
        # tokenizers merge spaces behind the end with the first word of the next turn
        turn_end = self.words_after_answers.rstrip(" ")
        if not turn_end.strip(" ") or not text.startswith(turn_end, answer.end):
            return end
        named_ends = self._named_ends()
        after = end
        for index in range(end, len(tokens.ids)):
            first, last = tokens.offsets[index]
            if first < last and first >= answer.end + len(turn_end):
                break
            after = index + 1
            if tokens.ids[index] in named_ends:
                break
        return after

    def _common_words_after_answers(self) -> str:
        """What follows every answer of the probes."""
        words_after_answers: list[str] = []
        for probe in self._probes(_CLOSINGS[0]):
            next_starts = [answer.start for answer in probe.answers[1:]] + [len(probe.text)]
            for answer, next_start in zip(probe.answers, next_starts, strict=True):
                words_after_answers.append(probe.text[answer.end : next_start])
        if not words_after_answers:
            return ""
        # the last turn ends with the text, all others go on with the next question
        common = min(words_after_answers, key=len)
        for words in words_after_answers:
            while not words.startswith(common):
                common = common[:-1]
        return common

    def _probes(self, closing: str) -> Iterator[Rendered]:
        """Conversations of one and of two turns whose answers close with the given character; those
        that the chat template refuses are left out."""
        turn = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": f"a{closing}"},
        ]
        for messages in (turn, [*turn, *turn]):
            try:
                yield self.chat.conversation(messages)
            except LayerfuseError:
                # what matters of it is told for the samples that need it
                continue

    def _special_ends(self) -> set[int]:
        """The special tokens that may end a turn: all but that of a picture."""
        return special_ids(self.tokenizer) - {self.text_tokenizer.image_token_id}

    def _named_ends(self) -> set[int]:
        """The tokens that end a turn alone, wherever they stand in its end: the special ones, and
        others with a name that the tokenizer's makers forgot to call special."""
        named = self._special_ends()
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            # runs of spaces and newlines are added tokens of some tokenizers
            if token.content.strip():
                named.add(token_id)
        return named - {self.text_tokenizer.image_token_id}


def _without_beginning_of(end: str, text: str) -> str:
    """The text without the longest part at its end with which `end` begins."""
    for length in range(len(end), 0, -1):
        if text.endswith(end[:length]):
            return text[:-length]
    return text


def _tokens_behind(answer: Span, text: str, tokens: Tokens, labelled: Span) -> list[int]:
    """The places of the labelled tokens that hold more than spaces of what follows an answer."""
    behind: list[int] = []
    for place in range(labelled.start, labelled.end):
        first, last = tokens.offsets[place]
        if text[max(first, answer.end) : last].strip(" "):
            behind.append(place)
    return behind
