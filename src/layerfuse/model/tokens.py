"""The tokens of a text in which names of special tokens may be written as ordinary text."""

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from layerfuse.model.chat_template import Rendered, Span


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, in order."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """the first and last + 1 character of each; both the same where a tokenizer adds a token"""

    def extend(self, following: "Tokens") -> None:
        """Append the tokens that follow these."""
        self.ids.extend(following.ids)
        self.offsets.extend(following.offsets)


# Any: tokenizers of transformers share no type that says what they have
def special_ids(tokenizer: Any) -> set[int]:
    """The ids of all special tokens of a tokenizer of transformers, the added ones too."""
    special: set[int] = set()
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special.add(token_id)
    return special


class TextTokenizer:
    """Makes tokens of what a chat template wrote and of what people wrote in it.

    Args:
        tokenizer: the LLM's, of transformers.
        image_token_id: the id of its image token.
    """

    # Any: tokenizers of transformers share no type that says what they have
    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self._nameless: Tokenizer | None = None

    def tokens(self, rendered: Rendered, add_special_tokens: bool = False) -> Tokens:
        """The tokens of a conversation.

        Args:
            rendered: the conversation; its literals become ordinary tokens.
            add_special_tokens: whether the tokenizer adds its own, such as that of the beginning;
                chat templates write these themselves.
        """
        text = rendered.text
        # Any: what tokenizers return is typed as a dictionary of nothing in particular
        encoded: Any = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
        )
        tokens = Tokens(encoded["input_ids"], encoded["offset_mapping"])
        if not rendered.literals:
            return tokens

        # Special tokens cut a text into stretches, of which a tokenizer takes each by itself. Those
        # that hold a literal are longer than it took them to be.
        added: dict[int, Any] = self.tokenizer.added_tokens_decoder
        special = special_ids(self.tokenizer) | {self.image_token_id}
        result = Tokens([], [])
        inside = Tokens([], [])
        stretch_start = 0
        # the special token before the stretch
        before: int | None = None
        for token_id, (first, last) in zip(tokens.ids, tokens.offsets, strict=True):
            is_written = token_id in special and not _overlaps(rendered.literals, first, last)
            if is_written and first < last and token_id in added:
                # that of unknown characters is special as well, but cuts nothing
                is_written = added[token_id].content in text[first:last]
            if not is_written:
                inside.ids.append(token_id)
                inside.offsets.append((first, last))
                continue
            stretch_end = first
            if first == last:
                # a token that covers no character is added at the beginning or at the end
                stretch_end = len(text)
            stretch = Span(stretch_start, stretch_end)
            result.extend(self._of_stretch(inside, rendered, stretch, before))
            inside = Tokens([], [])
            result.ids.append(token_id)
            result.offsets.append((first, last))
            if first < last:
                stretch_start = last
                before = token_id
        stretch = Span(stretch_start, len(text))
        result.extend(self._of_stretch(inside, rendered, stretch, before))
        return result

    def _of_stretch(
        self,
        inside: Tokens,
        rendered: Rendered,
        stretch: Span,
        before: int | None,
    ) -> Tokens:
        """The tokens between two special tokens.

        Args:
            inside: what the tokenizer made of the stretch.
            rendered: the text and its literals.
            stretch: the characters between the two.
            before: the special token before the stretch, None where it begins the text.
        """
        if inside.ids and _overlaps(rendered.literals, stretch.start, stretch.end):
            return self._as_text(rendered.text, stretch, before)
        return inside

    def _as_text(self, text: str, stretch: Span, before: int | None) -> Tokens:
        """The tokens of a stretch in which no name means a special token.

        Args:
            text: the conversation.
            stretch: its characters.
            before: the special token before them, None where they begin the text.
        """
        if self._nameless is None:
            self._nameless = _without_names(self.tokenizer, self.image_token_id)
        # Behind its special token, because some tokenizers put a space before the first word of a
        # text, others before the first word of each stretch.
        prefix = ""
        if before is not None and self._nameless.token_to_id(_unwritten(before)) == before:
            prefix = _unwritten(before)
        encoding = self._nameless.encode(
            prefix + text[stretch.start : stretch.end],
            add_special_tokens=False,
        )
        tokens = Tokens([], [])
        shift = stretch.start - len(prefix)
        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            tokens.ids.append(token_id)
            tokens.offsets.append((first + shift, last + shift))
        if prefix:
            # the special token itself
            del tokens.ids[0], tokens.offsets[0]
        return tokens


def _overlaps(spans: list[Span], start: int, end: int) -> bool:
    """Whether any of the spans shares a character with [start, end)."""
    return any(span.start < end and span.end > start for span in spans)


def _unwritten(token_id: int) -> str:
    """A name for a special token that nobody writes: of private-use characters."""
    return f"\ue003{token_id}\ue003"


def _without_names(tokenizer: Any, image_token_id: int) -> Tokenizer:
    """A copy of a tokenizer whose special tokens have names that nobody writes.

    `split_special_tokens` of transformers does less: a vocabulary that holds `</s>` as a piece may
    make that token of the characters, too, and after a special token that is split like all others
    words begin otherwise.

    Args:
        tokenizer: of transformers.
        image_token_id: its image token, which some do not call special.
    """
    settings: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    unwritten: dict[str, str] = {}
    for token in settings["added_tokens"]:
        if token["special"] or token["id"] == image_token_id:
            unwritten[token["content"]] = _unwritten(token["id"])
            token["content"] = _unwritten(token["id"])

    model: dict[str, Any] = settings["model"]
    vocabulary: Any = model["vocab"]
    if isinstance(vocabulary, dict):
        by_name: dict[str, int] = {**vocabulary}
        model["vocab"] = {unwritten.get(name, name): token_id for name, token_id in by_name.items()}
    else:
        # Unigram models have a list of pieces with their scores, in the order of the ids
        for piece in vocabulary:
            piece[0] = unwritten.get(piece[0], piece[0])
    if model.get("unk_token") in unwritten:
        model["unk_token"] = unwritten[model["unk_token"]]
    if "merges" in model:
        model["merges"] = _merges_of_others(model["merges"], unwritten)

    # the stretches of a text are neither padded nor cut, and get no tokens of their own
    for part in ("post_processor", "padding", "truncation"):
        settings[part] = None
    return Tokenizer.from_str(json.dumps(settings))


def _merges_of_others(merges: list[Any], names: dict[str, str]) -> list[Any]:
    """The merges of a byte-pair model that neither make a name nor begin with one.

    Args:
        merges: pairs, or texts of two words in older files.
        names: of the special tokens.
    """
    others: list[Any] = []
    for merge in merges:
        pair: list[str] = merge
        if isinstance(merge, str):
            pair = merge.split(" ")
        if pair[0] not in names and pair[1] not in names and "".join(pair) not in names:
            others.append(merge)
    return others
