"""What a model's words say: yes or no, or an option's letter."""

import re
import string
from collections.abc import Sequence

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.metrics import UNSEEN, normalize

LETTERS = string.ascii_uppercase
SCIENCEQA_LETTERS = "ABCDE"
SCIENCEQA_STATEMENT = re.compile(r"The answer is ([A-Z]).")
"""As in the script, where the last full stop is any character: `The answer is B` alone is none."""
STRICT_LETTER = re.compile(r"\(?([A-Z])\)?[.,:;!?]?")
PLAIN = {code + 0xFEE0: code for code in range(0x21, 0x7F)}
"""Wide letters, brackets and marks of Chinese and Japanese writing, and the plain ones. Other
forms stay, because a small two in an option's text is not a two."""

STATEMENT = re.compile(
    r"\b(?:"
    r"(?:answer|option|choice|letter)\b(?:\s+to\s+(?:the|this|your)\s+question\b)?"
    r"(?:\s+(?:is|(?:would|should|must|will|can|could|may|might)\s+be)\b)?"
    r"(?:\s+(?:probably|likely|most\s+likely|clearly|definitely)\b)?"
    r"\s*[:\-–—]?\s*(?:(?:option|choice)\b\s*)?"
    r"|(?:choose|pick|select|go\s+with|it\s+is|it['’]s|boxed)\b"
    r"|assistant\s*:"
    r"|(?:think|believe|guess|so|thus|hence|therefore)\b,?"
    r")"
    r"|(?:答案(?:应该|应)?(?:是|为)?|选择?(?!项)|选项)\s*:?\s*(?:选项)?\s*",
    re.IGNORECASE,
)
"""Words after which an option is named: `the answer is` or `should be`, `Answer:`, `option`,
`it's`, `I'd go with`, `I think`, `so`, and the first ones in Chinese."""
EXPLANATION = re.compile(
    r"\n\s*[*_#]*\s*(?:explanations?|reason(?:s|ing)?|rationale)\b", re.IGNORECASE
)
"""The beginning of a line below the answer that says why it is right."""
FIRST_LETTER = re.compile(
    r"[\s(\[{<>*`$\"'“‘]*"  # opening brackets and quotes
    r"([A-Za-z])(?![^\W_]|['’][^\W_]|\.[A-Za-z](?![A-Za-z]))"  # no word, no `I'm`, no `a.m.`
    r"(.*)",
    re.DOTALL,
)
"""A letter with which a claim begins, and what follows it."""
NOTHING_BEHIND = re.compile(r"[\s)\]}>.,:;!?。…*`$\"'”’]*")
"""What a letter alone may have behind it: not the signs of `C++` and `A-`."""
MARK_BEHIND = re.compile(r"[)\]}<>.:。…*`\"'”’]|\s*$|\s*\n|\s+[-–—]\s")
"""What makes a letter before it an option's, be it a capital or not."""
MARK_BEHIND_CAPITAL = re.compile(
    r"[,;!?]|\s+(?:because|since|as|which)\b"
    r"|\s+is\s+(?:(?:the|my)\s+)?(?:correct|right|best|answer)\b"
)
"""What makes a capital before it an option's. Other words do not: `A dog` has an article."""
DRESS = re.compile(r"\s*[)\]}>.,:;*`$\"'”’]*\s*(?:[-–—]\s+|=\s*)?")
"""What stands between an option's letter and its text."""
BRACKETED = re.compile(r"(?<![^\W_])(?<!\bnot )[(\[{]([A-Za-z])[)\]}]")
"""A letter alone in brackets, anywhere."""
MENTIONED = (
    re.compile(r"(?<![^\W_])(?<![.'’])([A-Za-z])(?=[)\]}.:`])(?!\.[A-Za-z](?![A-Za-z]))"),
    re.compile(r"(?<![^\W_])(?<![.'’])([A-Z])(?=\s*$|[,;/!?&]|\s+(?:or|and|nor)\b)"),
    re.compile(r"\b(?:or|and|nor|not)\s+[*_`$\"'“‘]*([A-Z])(?![^\W_])"),
)
"""Letters that may be other options', wherever they stand: `B)`, `B,`, `or B`; not `e.g.`."""


def first_sentence_yes_no(answer: str) -> str:
    """Read yes or no in an answer as POPE does.

    Source: POPE's `evaluate.py` and LLaVA's `eval_pope.py`. Its corners: whatever has no word of
    no is yes, an empty answer too; words are parted at spaces alone and `NO` is none of them, so
    that `NO` and `no!` are yes; `Not` is yes, and `I do not know` is no.

    Args:
        answer: what the model said.

    Returns:
        `no` if `No`, `no` or `not` is a word of what is before the first full stop, without
        commas; else `yes`.
    """
    first_sentence = answer.split(".")[0].replace(",", "")
    words = first_sentence.split(" ")
    if "No" in words or "not" in words or "no" in words:
        return "no"
    return "yes"


def leading_yes_no(answer: str) -> str:
    """Read yes or no in an answer as MME does.

    Source: MME's `calculation.py`. Its corner: letters count, not words, so that `know` and
    `Not sure` are no. lmms-eval differs: it also removes spaces at the ends and full stops, and
    takes `y` and `n`.

    Args:
        answer: what the model said.

    Returns:
        `yes` or `no`, whichever the first four characters hold, yes before no; else `other`.
    """
    beginning = answer.lower()[:4]
    if "yes" in beginning:
        return "yes"
    if "no" in beginning:
        return "no"
    return "other"


def scienceqa_letter(answer: str, options: int) -> str | None:
    """Read an option's letter as LLaVA does for ScienceQA.

    Source: LLaVA's `eval_science_qa.py`. An answer is a letter alone, or begins with a letter, a
    full stop and a space, or says `The answer is X` once with a character behind it.

    Args:
        answer: what the model said.
        options: how many there are.

    Returns:
        The letter, or None if the answer names none of the options in one of these ways. Older
        scripts of ScienceQA then guess; this one, and LLaVA's, count it as wrong.

    Raises:
        LayerfuseError: there are no options, or more than letters.
    """
    letters = _letters(options)
    # All five letters are looked for first, and only then whether there is such an option, so that
    # a wrong letter at the beginning hides a right one that is stated later.
    if answer in tuple(SCIENCEQA_LETTERS):
        letter = answer
    elif answer[:1] in tuple(SCIENCEQA_LETTERS) and answer[1:3] == ". ":
        letter = answer[0]
    else:
        stated = SCIENCEQA_STATEMENT.findall(answer)
        if len(stated) != 1:
            return None
        letter = stated[0]
    return letter if letter in letters else None


def strict_option_letter(answer: str, options: int) -> str | None:
    """Read an option's letter that stands alone, as for CV-Bench.

    Args:
        answer: what the model said.
        options: how many there are.

    Returns:
        The letter of an answer such as `(A)`, `A` or `A.`; None for every other answer, one with
        a further word or a small letter too.

    Raises:
        LayerfuseError: there are no options, or more than letters.
    """
    letters = _letters(options)
    alone = STRICT_LETTER.fullmatch(answer.strip())
    if alone is None or alone[1] not in letters:
        return None
    return alone[1]


def option_letter(answer: str, options: Sequence[str]) -> str | None:
    """Read which option an answer names, however it does so.

    Read are a letter alone (`B`, `(b)`, `**B**.`), a letter with a mark or the option's text
    behind it (`B) dog`, `B: dog`, `B dog`), either of them after `answer`, `option` or `choice`
    (`The answer is (B) because ...`), an option's text alone, and else a letter in brackets.

    Args:
        answer: what the model said.
        options: texts of the options A, B, ...

    Returns:
        The letter, or None if the answer names no option, or more than one. There is no default.
        A letter alone is a letter even where it is also another option's text. An article is no
        option: `A dog` names A only if that is its text. A text is compared after `normalize`, and
        names nothing if two options have it. What follows on a line that begins with
        `Explanation`, `Reason`, `Reasoning` or `Rationale` is not read, if anything comes before.

    Raises:
        LayerfuseError: there are no options, or more than letters.
    """
    letters = _letters(len(options))
    text = _without_explanation(answer.translate(UNSEEN).translate(PLAIN))
    named: set[str] = set()
    unexplained = text
    for start in [0, *(statement.end() for statement in STATEMENT.finditer(text))]:
        claim = text[start:]
        if _is_cut_off(text[:start], claim):
            continue
        letter = _wholly_named(claim, options)
        if letter is not None:
            named.add(letter)
            # Letters in an option's own text, such as `Both A and B`, name no others.
            unexplained = text[:start]
            break
        named |= _named_first(claim, options)
    # Brackets are only asked where nothing else names an option, because prose has them too.
    if not named:
        named = _known(BRACKETED.findall(text), letters)
    mentioned: set[str] = set()
    for pattern in MENTIONED:
        mentioned |= _known(pattern.findall(unexplained), letters)
    if len(named) == 1 and mentioned <= named:
        return named.pop()
    return None


def _letters(options: int) -> str:
    """The letters of so many options."""
    if not 1 <= options <= len(LETTERS):
        raise LayerfuseError(
            f"a closed question has 1 to {len(LETTERS)} options, which are named by letters, "
            f"not {options}"
        )
    return LETTERS[:options]


def _without_explanation(text: str) -> str:
    """What stands before a line that begins an explanation, if anything does."""
    explanation = EXPLANATION.search(text)
    if explanation is None or not text[: explanation.start()].strip():
        return text
    return text[: explanation.start()]


def _known(found: Sequence[str], letters: str) -> set[str]:
    """Those that are letters of options."""
    return {letter.upper() for letter in found if letter.upper() in letters}


def _is_cut_off(before: str, claim: str) -> bool:
    """Tell `The answer is a`, of which a limit of length has cut the noun, from `Answer: a`."""
    has_words_before = bool(before) and not before.rstrip().endswith(":")
    return has_words_before and claim.strip() == "a"


def _wholly_named(claim: str, options: Sequence[str]) -> str | None:
    """The option of a claim that is its letter, its text, or its letter and text alone."""
    letter, rest = _split(claim, options)
    if letter is not None and NOTHING_BEHIND.fullmatch(rest) is not None:
        return letter
    by_text = _of_text(claim, options)
    if by_text is not None:
        return by_text
    if letter is not None and _of_text(rest[_dress(rest) :], options) == letter:
        return letter
    return None


def _named_first(claim: str, options: Sequence[str]) -> set[str]:
    """The option with whose letter a claim begins, and the other whose text follows, if one's."""
    letter, rest = _split(claim, options)
    if letter is None:
        return set()
    is_capital = letter in claim[: len(claim) - len(rest)]
    is_marked = MARK_BEHIND.match(rest) is not None
    if not is_marked:
        is_marked = is_capital and MARK_BEHIND_CAPITAL.match(rest) is not None
    if not is_marked:
        return set()
    # A letter with the text of another option names both, and so neither is chosen.
    other = _of_text(rest[_dress(rest) :], options)
    return {letter} if other is None else {letter, other}


def _split(claim: str, options: Sequence[str]) -> tuple[str | None, str]:
    """The option's letter with which a claim begins, if it does, and what follows it."""
    found = FIRST_LETTER.match(claim)
    if found is None or found[1].upper() not in _letters(len(options)):
        return None, claim
    return found[1].upper(), found[2]


def _dress(rest: str) -> int:
    """How many characters stand between an option's letter and its text."""
    found = DRESS.match(rest)
    return 0 if found is None else found.end()


def _of_text(text: str, options: Sequence[str]) -> str | None:
    """The one option that has this text."""
    wanted = normalize(text.translate(PLAIN))
    if not wanted:
        return None
    found = [
        letter
        for letter, option in zip(LETTERS, options, strict=False)
        if normalize(option.translate(PLAIN)) == wanted
    ]
    return found[0] if len(found) == 1 else None
