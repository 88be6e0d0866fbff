"""How an answer is scored.

The functions after `exact_match` reproduce the released scripts of benchmarks to the last digit,
with their odd corners, so that scores can be set beside those in papers.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.vqa_words import (
    ARTICLES,
    CONTRACTIONS,
    NUMBER_WORDS,
    PUNCTUATION,
    VIZWIZ_CONTRACTIONS,
)

QUOTES = "'\"“”„‘’‚«»‹›「」『』"
STOPS = ".,!…。．｡、､，！।॥။၊។։۔،።፣᠃᠂"
"""Full stops, commas and exclamation marks of Latin, Chinese, Japanese, Indian, Burmese, Khmer,
Armenian, Arabic, Ethiopian and Mongolian writing."""
DECIMAL_POINTS = ".,．，。、،።۔।"
"""Full stops and commas, which before a digit make a number smaller: `.5` and `,5` are not `5`."""
UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))
"""Characters that nobody sees and that change no word: the byte order mark, spaces without width,
marks of direction, soft hyphens."""

AGREEING = 3
"""How many other annotators must have given an answer of VQA for it to be wholly right."""
ANNOTATORS = 10
"""How many people answered each question of VQA, OK-VQA, TextVQA and VizWiz."""
COMMA_IN_NUMBER = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
"""A full stop that is not before a digit. The script's pattern also means to ask what is before
it, but is misspelt there and asks nothing."""
FULL_STOPS_REMOVED = 32
"""The script passes `re.UNICODE`, whose value is 32, where the number of replacements belongs."""


def normalize(text: str) -> str:
    """Write an answer so that equal ones are equal texts.

    Args:
        text: an answer.

    Returns:
        It in lower case, with composed accents and single spaces, without characters that nobody
        sees, and without full stops, commas, exclamation marks and quotes at its ends. A full stop
        or a comma before a number stays, because it belongs to it, and so do signs and units
        (`-`, `+`, `%`). An answer of nothing but such marks stays as it is.
    """
    composed = unicodedata.normalize("NFC", text.translate(UNSEEN))
    single_spaced = " ".join(composed.lower().split())
    bare = single_spaced.rstrip(" " + QUOTES + STOPS)
    without_stops = bare.lstrip(" " + QUOTES + STOPS)
    before = bare[: len(bare) - len(without_stops)]
    # Digits of any writing, and fractions such as one half.
    is_number = without_stops[:1].isnumeric()
    if is_number and before.endswith(tuple(DECIMAL_POINTS)):
        return before[-1] + without_stops
    return without_stops or single_spaced


def exact_match(prediction: str, answer: str) -> float:
    """Score a prediction.

    Args:
        prediction: what the model said.
        answer: what was expected.

    Returns:
        1.0 if the two are the same after `normalize`, else 0.0; an empty prediction is never
        right.
    """
    said = normalize(prediction)
    return float(bool(said) and said == normalize(answer))


def vqa_normalize(text: str) -> str:
    """Write an answer as the evaluation of VQA does before it compares.

    Source: `processPunctuation` and `processDigitArticle` of the VQA API's `vqaEval.py`.

    Args:
        text: an answer.

    Returns:
        It in lower case and without punctuation and articles, with numbers up to ten as digits and
        contractions with apostrophes. A mark beside a space disappears everywhere, and so does
        every mark where the text has a comma between digits; otherwise it becomes a space. So
        `1,000` is `1000`, `red/blue` is `red blue`, and `red, blue,green` is `red bluegreen`.
        Only the first 32 full stops disappear.
    """
    return _vqa_words(_vqa_punctuation(_one_line(text)), CONTRACTIONS)


def vqa_soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer by those of annotators, as the test server of VQA v2 does.

    Source: `evaluate` of the VQA API's `vqaEval.py` as it is now. Prediction and answers are
    normalized only if the annotators disagree: where all wrote `a dog`, `dog` scores 0. The first
    versions of the script always normalized the prediction, and only the answers' punctuation.

    Args:
        prediction: what the model said.
        answers: those of all annotators, usually ten.

    Returns:
        The mean, over the annotators left out one at a time, of a third for each of the others
        who gave this answer, at most 1.

    Raises:
        LayerfuseError: there are no answers.
    """
    # Whether annotators disagree is asked before anything but spaces at the ends is removed.
    said = _one_line(prediction)
    given = [_one_line(answer) for answer in answers]
    if len(set(given)) > 1:
        said = vqa_normalize(said)
        given = [vqa_normalize(answer) for answer in given]
    return _leave_one_out(said, given)


def vizwiz_soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer by those of annotators, as VizWiz's own script does.

    Source: `evaluate` of the VizWiz API's `vqaEval.py`, which differs from VQA's: the prediction
    is always normalized, and the answers never are. Its contractions have curly apostrophes, so
    that `dont` is never an annotator's `don't`.

    Args:
        prediction: what the model said.
        answers: those of all annotators.

    Returns:
        As `vqa_soft_accuracy`.

    Raises:
        LayerfuseError: there are no answers.
    """
    said = _vqa_words(_vqa_punctuation(_one_line(prediction)), VIZWIZ_CONTRACTIONS)
    return _leave_one_out(said, answers)


def evalai_normalize(text: str) -> str:
    """Write an answer as M4C and LLaVA do for TextVQA, and LLaVA for what it sends to the test
    servers of VQA v2 and VizWiz.

    Source: `EvalAIAnswerProcessor` of LLaVA's `m4c_evaluator.py`.

    Args:
        text: an answer.

    Returns:
        As `vqa_normalize`, but commas and question marks are removed first, so that `red,blue` is
        `redblue`, and `'s` becomes a word of its own.
    """
    # In lower case first, so that `'S` is a genitive too.
    without_marks = text.lower().replace(",", "").replace("?", "")
    return vqa_normalize(without_marks.replace("'s", " 's"))


def evalai_soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score an answer by those of annotators, as M4C and LLaVA do for TextVQA and lmms-eval for
    OK-VQA.

    Source: `TextVQAAccuracyEvaluator` of LLaVA's `m4c_evaluator.py`. It tabulates a score for each
    different answer, which is the score that leaving one annotator out gives.

    Args:
        prediction: what the model said.
        answers: those of all annotators.

    Returns:
        As `vqa_soft_accuracy`, but prediction and answers are always normalized, by
        `evalai_normalize`.

    Raises:
        LayerfuseError: there are no answers.
    """
    given = [evalai_normalize(answer) for answer in answers]
    return _leave_one_out(evalai_normalize(prediction), given)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _vqa_punctuation(text: str) -> str:
    """Apply the rules of VQA for punctuation."""
    has_comma_in_number = COMMA_IN_NUMBER.search(text) is not None
    written = text
    # Spaces are looked for in the text as it came, not in what earlier marks have left of it.
    for mark in PUNCTUATION:
        is_beside_space = mark + " " in text or " " + mark in text
        if is_beside_space or has_comma_in_number:
            written = written.replace(mark, "")
        else:
            written = written.replace(mark, " ")
    return FULL_STOP.sub("", written, count=FULL_STOPS_REMOVED)


def _vqa_words(text: str, contractions: Mapping[str, str]) -> str:
    """Apply the rules of VQA for numbers, articles and contractions."""
    words: list[str] = []
    for word in text.lower().split():
        # Numbers, articles, contractions: each is looked up in what the one before has made.
        number = NUMBER_WORDS.get(word, word)
        if number not in ARTICLES:
            words.append(contractions.get(number, number))
    return " ".join(words)


def _leave_one_out(said: str, answers: Sequence[str]) -> float:
    """Score an answer against all annotators but one, and average."""
    if not answers:
        raise LayerfuseError("an answer is scored by those of annotators, and there are none")
    scores: list[float] = []
    for left_out in range(len(answers)):
        # By place and not by text: another annotator with the same answer stays.
        others = [*answers[:left_out], *answers[left_out + 1 :]]
        scores.append(min(1, others.count(said) / AGREEING))
    return sum(scores) / len(scores)


def gqa_match(prediction: str, answer: str) -> float:
    """Score an answer of GQA as LLaVA does.

    Source: LLaVA's `convert_gqa_for_eval.py`, then GQA's `eval.py`, which compares texts as they
    are. Spaces at the ends and articles are therefore wrong, and the annotated answer, which GQA
    writes in lower case, is not changed.

    Args:
        prediction: what the model said.
        answer: the annotated one.

    Returns:
        1.0 if the prediction is the answer once it has no full stops at its end and is in lower
        case, else 0.0.
    """
    return float(prediction.rstrip(".").lower() == answer)


def ocrbench_contains(prediction: str, answers: Sequence[str], handwritten_math: bool) -> float:
    """Score an answer of OCRBench.

    Source: OCRBench's `example.py`. lmms-eval differs: it lowers the case of what is said about
    handwritten mathematics, but not of the answer, so that answers with capitals are never found.

    Args:
        prediction: what the model said.
        answers: any of which is right. An empty one is contained in everything.
        handwritten_math: whether the question is of HME100k, where spaces do not count and case
            does; elsewhere it is the other way round.

    Returns:
        1.0 if an answer is somewhere in the prediction, else 0.0.
    """

    def written(text: str) -> str:
        if handwritten_math:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.lower().strip().replace("\n", " ")

    said = written(prediction)
    return float(any(written(answer) in said for answer in answers))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Score an answer by how many characters it gets wrong: DocVQA, InfographicVQA, ST-VQA.

    Source: the script of the Robust Reading Competition. Its corner: the distance is between the
    texts in lower case and with single spaces, but is divided by the length of the longer text as
    it was, in capitals. Superfluous spaces therefore make a wrong answer less wrong.

    Args:
        prediction: what the model said.
        answers: any of which is right.
        threshold: a similarity below it is 0.

    Returns:
        The similarity to the nearest answer, 0..1.

    Raises:
        LayerfuseError: there are no answers.
    """
    if not answers:
        raise LayerfuseError("ANLS compares an answer with right ones, and there are none")
    distances: list[float] = []
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))
        if length == 0:
            distances.append(0.0)
        else:
            edits = edit_distance(_single_spaced(answer), _single_spaced(prediction))
            distances.append(edits / length)
    similarity = 1 - min(distances)
    if similarity < threshold:
        return 0.0
    return similarity


def _single_spaced(text: str) -> str:
    return " ".join(text.strip().lower().split())


def edit_distance(first: str, second: str) -> int:
    """Count the edits between two texts, after Levenshtein.

    Args:
        first: a text.
        second: another.

    Returns:
        The smallest number of characters to insert, remove or replace.
    """
    # The distances of all beginnings of `second` to the beginning of `first` read so far.
    above = list(range(len(second) + 1))
    for row, character in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            replaced = above[column - 1] + (character != other)
            removed = above[column] + 1
            inserted = current[column - 1] + 1
            current.append(min(replaced, removed, inserted))
        above = current
    return above[-1]


def relaxed_match(prediction: str, answer: str, tolerance: float = 0.05) -> float:
    """Score an answer of ChartQA.

    Source: `relaxed_correctness` of pix2struct's `metrics.py`, which Qwen-VL and lmms-eval use.
    Its corners: `10%` is 0.1 and so is not near `10`; where 0 is expected texts are compared, so
    that `0.0` is not `0`; `1.05` is, as a float, more than 5 % from `1`; a sentence with a number
    in it is no number.

    Args:
        prediction: what the model said.
        answer: the annotated one.
        tolerance: the largest relative error of a number.

    Returns:
        1.0 if both are numbers and near each other, or if they are the same but for case, else
        0.0.
    """
    said = _chart_number(prediction)
    expected = _chart_number(answer)
    # Zero is left to the comparison of texts, as nothing can be relative to it.
    if said is not None and expected:
        return float(abs(said - expected) / abs(expected) <= tolerance)
    return float(prediction.lower() == answer.lower())


def _chart_number(text: str) -> float | None:
    """Read a number, or a number with signs of percent behind it."""
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class BinaryCounts:
    """How often yes and no were said, and were right: POPE and MME.

    A share of nothing is 0, as scikit-learn and lmms-eval have it: precision where yes is never
    said, recall where yes is never right, F1 where both are 0. POPE's own script, and LLaVA's,
    divide by zero there and stop.

    Attributes:
        true_positives: yes said, and right.
        false_positives: yes said where no is right.
        true_negatives: no said, and right.
        false_negatives: no said where yes is right.
        others: neither was said. They count as wrong, and as answers, but not towards precision
            and recall, as in MME's script.
    """

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    others: int = 0

    @property
    def answers(self) -> int:
        """How many answers there are; none is a `LayerfuseError`."""
        said_yes = self.true_positives + self.false_positives
        said_no = self.true_negatives + self.false_negatives
        total = said_yes + said_no + self.others
        if total == 0:
            raise LayerfuseError("there are no answers of yes or no to score")
        return total

    @property
    def accuracy(self) -> float:
        """The share of answers that are right, 0..1."""
        return (self.true_positives + self.true_negatives) / self.answers

    @property
    def precision(self) -> float:
        """The share of yes that is right, 0..1."""
        return _share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """The share of the questions with yes that were answered so, 0..1."""
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall, 0..1."""
        both = 2 * self.precision * self.recall
        return _share(both, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        """The share of answers that are yes, 0..1."""
        return (self.true_positives + self.false_positives) / self.answers


def _share(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0
    return part / whole


def count_yes_no(said: Sequence[str], right: Sequence[str]) -> BinaryCounts:
    """Count answers of yes and no.

    Args:
        said: `yes`, `no` or `other`, as `first_sentence_yes_no` and `leading_yes_no` give them.
        right: `yes` or `no`, for each of them.

    Returns:
        The counts.

    Raises:
        LayerfuseError: there is another word, or there are more of one than of the other.
    """
    if len(said) != len(right):
        raise LayerfuseError(f"{len(said)} answers were said, but {len(right)} are right")
    pairs = list(zip(said, right, strict=True))
    for answer, label in pairs:
        if answer not in ("yes", "no", "other"):
            raise LayerfuseError(f"an answer is yes, no or other, not {short(answer)}")
        if label not in ("yes", "no"):
            raise LayerfuseError(f"what is right is yes or no, not {short(label)}")
    return BinaryCounts(
        true_positives=pairs.count(("yes", "yes")),
        false_positives=pairs.count(("yes", "no")),
        true_negatives=pairs.count(("no", "no")),
        false_negatives=pairs.count(("no", "yes")),
        others=list(said).count("other"),
    )


def closed_answer(log_likelihoods: Sequence[float]) -> int:
    """Choose the most likely candidate of a closed question.

    Args:
        log_likelihoods: of the candidates.

    Returns:
        The index of the highest; of equal ones, the first.

    Raises:
        LayerfuseError: there is no candidate, or one is not a number.
    """
    if not log_likelihoods:
        raise LayerfuseError("a closed question needs at least one candidate, and there is none")
    # Comparisons with it are all false, so that its place among the others would decide.
    for index, value in enumerate(log_likelihoods):
        if math.isnan(value):
            raise LayerfuseError(
                f"the log-likelihood of candidate {index} is not a number, so none can be chosen"
            )
    return max(range(len(log_likelihoods)), key=lambda index: log_likelihoods[index])
