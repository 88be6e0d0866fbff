"""Metrics of the field's benchmarks: the corners of their scripts, worked by hand."""

import math
import random

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer_parsing import (
    first_sentence_yes_no,
    leading_yes_no,
)
from layerfuse.evaluate.metrics import (
    BinaryCounts,
    anls,
    closed_answer,
    count_yes_no,
    edit_distance,
    evalai_normalize,
    evalai_soft_accuracy,
    gqa_match,
    ocrbench_contains,
    relaxed_match,
    vizwiz_soft_accuracy,
    vqa_normalize,
    vqa_soft_accuracy,
)
from layerfuse.evaluate.vqa_words import CONTRACTIONS


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("A Dog", "dog"),
        ("an apple on the\ttable\n", "apple on table"),
        ("Two", "2"),
        ("none", "0"),
        # Eleven is no number word, and neither is a part of one
        ("eleven", "eleven"),
        ("twofold", "twofold"),
        # A mark between letters becomes a space, one beside a space disappears
        ("red/blue", "red blue"),
        ("t-shirt", "t shirt"),
        # ... beside a space of the text as it came, not one that another mark has become
        ("x;/y/z", "x y z"),
        ("red, blue", "red blue"),
        # ... and it does so everywhere, once it stands beside a space anywhere
        ("red, blue,green", "red bluegreen"),
        # A mark at an end stands beside no space, and becomes one
        ("yes!", "yes"),
        # A comma between digits makes every mark disappear
        ("1,000", "1000"),
        ("1,000 red/blue", "1000 redblue"),
        ("3,a", "3"),
        # A full stop stays where a digit follows, whatever is before it
        ("3.5", "3.5"),
        ("3.", "3"),
        ("a.5", "a.5"),
        ("U.S.A.", "usa"),
        # ... and only 32 of them disappear
        ("." * 40, "." * 8),
        # Marks without a rule stay
        ("5:30", "5:30"),
        ("$5 & 10%", "$5 & 10%"),
        # Contractions: what the table has, what it forgot, and its oddities
        ("dont", "don't"),
        ("itll", "it'll"),
        ("ill", "ill"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("ow's'at", "'ow's'at"),
        # A contraction that is the name of a thing is changed too
        ("shed've", "she'd've"),
        # Articles are looked for before contractions are made, and after numbers
        ("the", ""),
        ("", ""),
    ],
)
def test_vqa_normalize_keeps_the_corners_of_the_script(text: str, written: str) -> None:
    assert vqa_normalize(text) == written


def test_contractions_have_no_article_and_no_number_among_them() -> None:
    assert len(CONTRACTIONS) == 120
    assert not {"a", "an", "the", "one", "none"} & set(CONTRACTIONS)
    changed_letters = {
        word
        for word, written in CONTRACTIONS.items()
        if word.replace("'", "") != written.replace("'", "")
    }
    assert changed_letters == set()


TEN_CATS = ["cat"] * 10


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("cat", TEN_CATS, 1.0),
        ("dog", TEN_CATS, 0.0),
        # Four matches: three remain, whoever is left out
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        # Three: two remain for the three of them, three for the seven others
        ("cat", ["cat"] * 3 + ["dog"] * 7, (3 * 2 / 3 + 7) / 10),
        ("cat", ["cat"] * 2 + ["dog"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("cat", ["cat"] + ["dog"] * 9, (9 * 1 / 3) / 10),
        # Both sides are normalized where annotators disagree ...
        ("The Cat.", ["a cat"] * 4 + ["dog"] * 6, 1.0),
        ("2", ["two"] * 9 + ["2"], 1.0),
        # ... and neither where they agree: a capital is then wrong, and an article is asked for
        ("The cat", TEN_CATS, 0.0),
        ("cat", ["a cat"] * 10, 0.0),
        ("a cat", ["a cat"] * 10, 1.0),
        # Lines and spaces at the ends are never asked for
        (" cat\n", ["cat "] * 10, 1.0),
        ("cat", ["cat"] * 9 + ["cat\n"], 1.0),
        # One annotator leaves nobody to agree with
        ("cat", ["cat"], 0.0),
    ],
)
def test_vqa_leaves_one_annotator_out_and_averages(
    prediction: str, answers: list[str], score: float
) -> None:
    assert vqa_soft_accuracy(prediction, answers) == pytest.approx(score, abs=1e-15)


def closed_form_accuracy(matches: int, annotators: int) -> float:
    """The soft accuracy by how many annotators gave the answer."""
    with_one_less = min(1, max(0, matches - 1) / 3)
    with_all = min(1, matches / 3)
    return (matches * with_one_less + (annotators - matches) * with_all) / annotators


@pytest.mark.parametrize("annotators", [5, 10])
def test_vqa_is_a_function_of_how_many_annotators_agree(annotators: int) -> None:
    for matches in range(annotators):
        answers = ["yes"] * matches + ["no"] * (annotators - matches - 1) + ["maybe"]
        expected = closed_form_accuracy(matches, annotators)
        assert vqa_soft_accuracy("yes", answers) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        # The prediction is normalized even where all agree, and the answers never are
        ("The cat", TEN_CATS, 1.0),
        ("a cat", ["a cat"] * 10, 0.0),
        ("Unanswerable.", ["unanswerable"] * 4 + ["blurry"] * 6, 1.0),
        ("two", ["two"] * 9 + ["2"], 9 * (1 / 3) / 10),
        # Contractions with curly apostrophes, which annotators do not write; a few are straight
        ("dont", ["don't"] * 10, 0.0),
        ("dont", ["don’t"] * 10, 1.0),
        ("don't", ["don't"] * 10, 1.0),
        ("cant", ["can't"] * 10, 1.0),
        ("weve", ["we've"] * 10, 1.0),
        ("couldn'tve", ["couldn’t’ve"] * 10, 1.0),
        ("let's", ["let's"] * 10, 1.0),
        ("somebody’d", ["somebodyd"] * 10, 1.0),
    ],
)
def test_vizwiz_normalizes_the_prediction_alone(
    prediction: str, answers: list[str], score: float
) -> None:
    assert vizwiz_soft_accuracy(prediction, answers) == pytest.approx(score, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        # Commas and question marks go first, so that neither becomes a space
        ("red,blue", "redblue"),
        ("red, blue", "red blue"),
        ("what?now", "whatnow"),
        ("1,000", "1000"),
        # ... nor does a comma between digits make other marks disappear
        ("1,000 red/blue", "1000 red blue"),
        # The genitive becomes a word, and so do contractions with `'s`
        ("McDonald's", "mcdonald 's"),
        ("MCDONALD'S", "mcdonald 's"),
        ("let's go", "let 's go"),
        ("The dont", "don't"),
    ],
)
def test_evalai_normalizes_commas_and_genitives_otherwise(text: str, written: str) -> None:
    assert evalai_normalize(text) == written


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        # Normalized although all agree
        ("cat", ["a cat"] * 10, 1.0),
        ("Red,Blue", ["redblue"] * 3 + ["red"] * 7, (3 * 2 / 3 + 7) / 10),
        ("green", ["red"] * 10, 0.0),
    ],
)
def test_textvqa_scores_ten_answers(prediction: str, answers: list[str], score: float) -> None:
    assert evalai_soft_accuracy(prediction, answers) == pytest.approx(score, abs=1e-15)


def test_soft_accuracies_refuse_a_wrong_number_of_annotators() -> None:
    with pytest.raises(LayerfuseError, match="there are none"):
        evalai_soft_accuracy("cat", [])
    with pytest.raises(LayerfuseError, match="there are none"):
        vqa_soft_accuracy("cat", [])
    with pytest.raises(LayerfuseError, match="there are none"):
        vizwiz_soft_accuracy("cat", [])


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Yes.", "yes", 1.0),
        ("Yes...", "yes", 1.0),
        ("traffic light", "traffic light", 1.0),
        # Neither spaces nor articles nor other marks are removed
        ("yes ", "yes", 0.0),
        ("Yes. ", "yes", 0.0),
        ("the dog", "dog", 0.0),
        ("yes!", "yes", 0.0),
        # The annotated answer is taken as it is
        ("Yes", "Yes", 0.0),
    ],
)
def test_gqa_removes_full_stops_and_case_of_the_prediction(
    prediction: str, answer: str, score: float
) -> None:
    assert gqa_match(prediction, answer) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "handwritten_math", "score"),
    [
        ("The sign says STOP\nhere", ["stop here"], False, 1.0),
        ("12345", ["234"], False, 1.0),
        ("stop", ["stop here"], False, 0.0),
        ("centre", ["center", "Centre "], False, 1.0),
        # Spaces count in words and not in mathematics
        ("a b", ["ab"], False, 0.0),
        ("\\frac { a } { b }", ["\\frac{a}{b}"], True, 1.0),
        ("a\nb", ["a b"], True, 1.0),
        # Case counts in mathematics and not in words
        ("X + Y", ["x+y"], True, 0.0),
        ("X+Y", ["x+y"], False, 1.0),
        # An empty answer is in everything
        ("anything", [""], False, 1.0),
        ("anything", [], False, 0.0),
    ],
)
def test_ocrbench_looks_for_an_answer_anywhere(
    prediction: str, answers: list[str], handwritten_math: bool, score: float
) -> None:
    assert ocrbench_contains(prediction, answers, handwritten_math) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Hello  World", ["hello world"], 1.0),
        # One of five letters is wrong
        ("hallo", ["hello"], 1 - 1 / 5),
        # Exactly the threshold is kept, and what is below is nothing
        ("abxx", ["abcd"], 0.5),
        ("axxx", ["abcd"], 0.0),
        ("hallo", ["world", "hello"], 1 - 1 / 5),
        # Two spaces at the ends make the longer text seven long, and the mistake smaller
        (" hallo ", ["hello"], 1 - 1 / 7),
        # In capitals an eszett is two letters
        ("maß", ["mas"], 1 - 1 / 4),
        ("", ["hello"], 0.0),
        ("", [""], 1.0),
        (" ", [""], 1.0),
    ],
)
def test_anls_divides_edits_by_the_length_of_the_texts_as_they_came(
    prediction: str, answers: list[str], score: float
) -> None:
    assert anls(prediction, answers) == score


def test_anls_takes_a_threshold_and_wants_an_answer() -> None:
    assert anls("axxx", ["abcd"], threshold=0.25) == 0.25
    with pytest.raises(LayerfuseError, match="there are none"):
        anls("hello", [])


def naive_edit_distance(first: str, second: str) -> int:
    """By its definition, without remembering anything."""
    if not first or not second:
        return len(first) + len(second)
    replaced = naive_edit_distance(first[1:], second[1:]) + (first[0] != second[0])
    removed = naive_edit_distance(first[1:], second) + 1
    inserted = naive_edit_distance(first, second[1:]) + 1
    return min(replaced, removed, inserted)


def test_edit_distance_is_that_of_its_definition() -> None:
    assert edit_distance("kitten", "sitting") == 3
    generator = random.Random(0)
    for _ in range(50):
        first = "".join(generator.choices("abc", k=generator.randrange(6)))
        second = "".join(generator.choices("abc", k=generator.randrange(6)))
        assert edit_distance(first, second) == naive_edit_distance(first, second)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1.0),
        ("95", "100", 1.0),
        ("106", "100", 0.0),
        ("-100", "100", 0.0),
        ("-104", "-100", 1.0),
        # As a float, 1.05 is a little more than five per cent away
        ("1.05", "1", 0.0),
        # A sign of percent is a hundredth, on either side
        ("10%", "0.1", 1.0),
        ("0.1", "10%", 1.0),
        ("10%", "10", 0.0),
        ("10%%", "10%", 1.0),
        ("10 %", "10%", 1.0),
        ("10% ", "10%", 0.0),
        # Where zero is expected, texts are compared
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),
        ("0%", "0", 0.0),
        ("0", "5", 0.0),
        # Whatever Python reads as a float is a number
        (" 100\n", "100", 1.0),
        ("1e2", "100", 1.0),
        ("1_00", "100", 1.0),
        ("1,000", "1000", 0.0),
        ("nan", "nan", 0.0),
        ("inf", "inf", 0.0),
        # Everything else is compared as text
        ("Blue", "blue", 1.0),
        ("blue.", "blue", 0.0),
        ("about 100", "100", 0.0),
        ("%", "%", 1.0),
    ],
)
def test_relaxed_match_reads_numbers_as_pix2struct_does(
    prediction: str, answer: str, score: float
) -> None:
    assert relaxed_match(prediction, answer) == score


def test_relaxed_match_takes_a_tolerance() -> None:
    assert relaxed_match("110", "100", tolerance=0.1) == 1.0
    assert relaxed_match("104", "100", tolerance=0.0) == 0.0


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes, there is a dog.", "yes"),
        ("No, there is no dog.", "no"),
        ("There is not a dog", "no"),
        # Only the first sentence counts, and nothing before a full stop is a sentence too
        ("There is a dog. There is no cat.", "yes"),
        (". No", "yes"),
        # Words are parted at spaces, without commas, and compared with their case
        ("no,", "no"),
        ("NO", "yes"),
        ("no!", "yes"),
        ("\nno", "yes"),
        ("Not a dog", "yes"),
        ("I do not know", "no"),
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_no_in_the_first_sentence_and_else_yes(answer: str, read: str) -> None:
    assert first_sentence_yes_no(answer) == read


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        ("YES, it is", "yes"),
        ("No.", "no"),
        ("yes\n", "yes"),
        # Letters count, not words
        ("know", "no"),
        ("Not sure", "no"),
        ("eyes", "yes"),
        # Four characters, spaces among them
        (" yes", "yes"),
        ("  yes", "other"),
        ("Oh no", "other"),
        ("It is.", "other"),
        ("y", "other"),
        ("n", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_the_first_four_characters(answer: str, read: str) -> None:
    assert leading_yes_no(answer) == read


def test_binary_counts_give_the_measures_of_pope() -> None:
    said = ["yes", "yes", "yes", "no", "no", "yes", "no", "no"]
    right = ["yes", "yes", "no", "no", "yes", "no", "no", "no"]
    counts = count_yes_no(said, right)
    assert counts == BinaryCounts(2, 2, 3, 1)
    assert counts.accuracy == 5 / 8
    assert counts.precision == 2 / 4
    assert counts.recall == 2 / 3
    assert counts.f1 == pytest.approx(4 / 7, abs=1e-15)
    assert counts.yes_ratio == 4 / 8


def test_an_answer_that_is_neither_is_wrong_but_outside_of_precision_and_recall() -> None:
    counts = count_yes_no(["yes", "other", "other", "no"], ["yes", "yes", "no", "no"])
    assert counts == BinaryCounts(1, 0, 1, 0, others=2)
    assert (counts.accuracy, counts.precision, counts.recall) == (0.5, 1.0, 1.0)
    assert counts.yes_ratio == 0.25


def test_shares_of_nothing_are_zero() -> None:
    never_yes = count_yes_no(["no", "no"], ["yes", "no"])
    assert (never_yes.precision, never_yes.recall, never_yes.f1) == (0.0, 0.0, 0.0)
    assert never_yes.accuracy == 0.5
    never_right = count_yes_no(["yes"], ["no"])
    assert (never_right.precision, never_right.recall, never_right.f1) == (0.0, 0.0, 0.0)
    assert never_right.yes_ratio == 1.0


def test_counting_yes_and_no_refuses_what_it_cannot_count() -> None:
    with pytest.raises(LayerfuseError, match="no answers"):
        _ = count_yes_no([], []).accuracy
    with pytest.raises(LayerfuseError, match="no answers"):
        _ = BinaryCounts(0, 0, 0, 0).yes_ratio
    with pytest.raises(LayerfuseError, match="2 answers were said, but 1"):
        count_yes_no(["yes", "no"], ["yes"])
    with pytest.raises(LayerfuseError, match="'Yes'"):
        count_yes_no(["Yes"], ["yes"])
    with pytest.raises(LayerfuseError, match="yes or no, not 'other'"):
        count_yes_no(["yes"], ["other"])


@pytest.mark.parametrize(
    ("log_likelihoods", "index"),
    [
        ([-3.0, -1.0, -2.0], 1),
        ([-1.0, -1.0], 0),
        ([-2.0, -1.0, -1.0], 1),
        ([-math.inf, -5.0], 1),
        ([-math.inf, -math.inf], 0),
        ([-7.0], 0),
    ],
)
def test_closed_answer_is_the_first_of_the_most_likely(
    log_likelihoods: list[float], index: int
) -> None:
    assert closed_answer(log_likelihoods) == index


def test_closed_answer_refuses_what_is_no_number() -> None:
    with pytest.raises(LayerfuseError, match="candidate 1 is not a number"):
        closed_answer([-1.0, math.nan, -2.0])
    with pytest.raises(LayerfuseError, match="at least one candidate"):
        closed_answer([])
