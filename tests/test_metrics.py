"""Metrics of the field's benchmarks: the corners of their scripts, worked by hand."""

import math
import random

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer_parsing import (
    first_sentence_yes_no,
    leading_yes_no,
    option_letter,
    scienceqa_letter,
    strict_option_letter,
)
from layerfuse.evaluate.boxes import Box, box_iou, read_box
from layerfuse.evaluate.metrics import (
    BinaryCounts,
    anls,
    closed_answer,
    count_yes_no,
    edit_distance,
    gqa_match,
    ocrbench_contains,
    relaxed_match,
    textvqa_normalize,
    textvqa_soft_accuracy,
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
def test_textvqa_normalizes_commas_and_genitives_otherwise(text: str, written: str) -> None:
    assert textvqa_normalize(text) == written


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
    assert textvqa_soft_accuracy(prediction, answers) == pytest.approx(score, abs=1e-15)


def test_soft_accuracies_refuse_a_wrong_number_of_annotators() -> None:
    with pytest.raises(LayerfuseError, match="10 annotators, not 9"):
        textvqa_soft_accuracy("cat", ["cat"] * 9)
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


ANIMALS = ["dog", "cat", "a bird", "two cats"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # A letter alone, however it is dressed
        ("B", "B"),
        ("b", "B"),
        ("a", "A"),
        (" B.\n", "B"),
        ("(B)", "B"),
        ("b)", "B"),
        ("[C]", "C"),
        ("**B**", "B"),
        ("'B'", "B"),
        ("（B）", "B"),
        ("B。", "B"),
        # A letter and words
        ("B: cat", "B"),
        ("B. cat", "B"),
        ("B cat", "B"),
        ("(B) cat", "B"),
        ("B - cat", "B"),
        ("b. the cat on the mat", "B"),
        ("B\nThe cat is on the mat.", "B"),
        ("A dog", "A"),
        ("B, because it is a cat", "B"),
        ("A because it barks", "A"),
        ("A is correct", "A"),
        # A letter after words
        ("The answer is B", "B"),
        ("The answer is (B).", "B"),
        ("the correct answer is: B. cat", "B"),
        ("Answer: (B)", "B"),
        ("answer: a", "A"),
        ("**Answer:** D", "D"),
        ("Option C", "C"),
        ("The correct option is C because of its wings.", "C"),
        ("The answer is option D.", "D"),
        ("It purrs, so the answer is B", "B"),
        ("It must be (C), I think", "C"),
        ("The letter is B.", "B"),
        ("I would choose B.", "B"),
        ("It's B", "B"),
        ("<answer>B</answer>", "B"),
        ("\\boxed{B}", "B"),
        ("B. The animal, e.g. in the picture, is furry.", "B"),
        # Its own text
        ("cat", "B"),
        ("Cat.", "B"),
        ("Answer: two cats", "D"),
        ("a bird", "C"),
        ("The answer is dog.", "A"),
        # Nothing that names one
        ("", None),
        ("...", None),
        ("bird", None),
        ("I see two cats and a dog", None),
        ("E", None),
        ("(E)", None),
        ("The answer is E.", None),
        ("I'm not sure", None),
        ("at 5 a.m. or so", None),
        ("It is not (B)", None),
        ("Because", None),
        # An article
        ("A horse", None),
        ("A cat", None),
        ("a horse", None),
        ("The answer is A horse", None),
        ("The answer is a", None),
        ("It is a", None),
        ("It is a horse", None),
        ("Answer: A horse and a cow", None),
        # More than one
        ("A or B", None),
        ("A and B", None),
        ("A, B", None),
        ("a) b)", None),
        ("A/B", None),
        ("Choices: A, B. I pick B", None),
        ("(A) or (B)", None),
        ("(A) or B", None),
        ("The answer is A or B", None),
        ("The answer is A. No, the answer is B.", None),
        ("Option A or option B", None),
        ("B, not A", None),
        ("A. dog B. cat C. a bird D. two cats", None),
        ("B: dog", None),
        ("The answer is (B) dog", None),
    ],
)
def test_option_letter_reads_one_option_or_none(answer: str, letter: str | None) -> None:
    assert option_letter(answer, ANIMALS) == letter


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        # A letter is a letter, even where it is another option's text
        ("B", ["C", "A", "B"], "B"),
        ("(A)", ["C", "A", "B"], "A"),
        ("B. A", ["C", "A", "B"], "B"),
        # ... and a text where it is no letter of an option
        ("E", ["D", "E"], "B"),
        # An option's text may name others
        ("D", ["x", "y", "both A and B", "none"], "D"),
        ("C. Both A and B", ["x", "y", "both A and B", "none"], "C"),
        ("both A and B", ["x", "y", "both A and B", "none"], "C"),
        # A text that two options have names neither
        ("cat", ["cat", "Cat.", "dog"], None),
        ("A. cat", ["cat", "Cat.", "dog"], "A"),
        # Signs belong to a text
        ("C++", ["Java", "C++", "C#"], "B"),
        ("A-", ["B+", "A-"], "B"),
        ("B. -5", ["5", "-5"], "B"),
        ("B. 5", ["5", "-5"], None),
        (".5", ["5", ".5"], "B"),
        ("5\u00b2", ["52", "5\u00b2"], "B"),
        ("Ｂ．　狗", ["猫", "狗"], "B"),
        ("（狗）", ["猫", "（狗）"], "B"),
        # Whole texts alone: no part of one is read
        ("A is closer", ["B is closer", "A is closer"], "B"),
        ("yes", ["yes", "no"], "A"),
    ],
)
def test_option_letter_knows_the_texts_of_options(
    answer: str, options: list[str], letter: str | None
) -> None:
    assert option_letter(answer, options) == letter


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(
    "phrase", ["{}", "({})", "{}.", "The answer is {}", "Answer: {}.", "{} because I see it"]
)
def test_option_letter_treats_all_letters_alike(phrase: str, index: int) -> None:
    letter = "ABCDE"[index]
    options = ["red", "green", "blue", "black", "white"]
    assert option_letter(phrase.format(letter), options) == letter
    assert option_letter(f"{letter} horse", options) is None


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("(A)", "A"),
        ("A.", "A"),
        ("(C).", "C"),
        (" B\n", "B"),
        ("a", None),
        ("(a)", None),
        ("D", None),
        ("A dog", None),
        ("(A) dog", None),
        ("The answer is A", None),
        ("AB", None),
        ("", None),
    ],
)
def test_strict_option_letter_is_a_letter_alone(answer: str, letter: str | None) -> None:
    assert strict_option_letter(answer, 3) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("C. the third", "C"),
        ("B. ", "B"),
        ("The answer is B.", "B"),
        ("So: The answer is B. BECAUSE: it is.", "B"),
        # The full stop of the pattern is any character, but a character
        ("The answer is B!", "B"),
        ("The answer is B", None),
        ("The answer is B\n", None),
        # Said twice, it is not read, even if it is the same
        ("The answer is A. The answer is A.", None),
        # A letter at the beginning counts before what is stated
        ("A. No. The answer is B.", "A"),
        # Letters without options fail, though another is stated
        ("D", None),
        ("E. No. The answer is B.", None),
        ("The answer is Z.", None),
        # Neither spaces nor brackets nor small letters are read
        ("A ", None),
        ("A.", None),
        ("(A)", None),
        ("a", None),
        ("AB", None),
        ("", None),
    ],
)
def test_scienceqa_letter_is_that_of_llava(answer: str, letter: str | None) -> None:
    assert scienceqa_letter(answer, 3) == letter


def test_options_without_letters_are_refused() -> None:
    with pytest.raises(LayerfuseError, match="1 to 26 options"):
        option_letter("A", [])
    with pytest.raises(LayerfuseError, match="not 27"):
        strict_option_letter("A", 27)
    with pytest.raises(LayerfuseError, match="not 0"):
        scienceqa_letter("A", 0)


@pytest.mark.parametrize(
    ("text", "scale", "size", "padded", "box"),
    [
        ("[10, 20, 30, 40]", "pixels", (100, 50), False, (10.0, 20.0, 30.0, 40.0)),
        ("[0.25, 0.5, 0.75, 1.0]", "unit", (200, 100), False, (50.0, 50.0, 150.0, 100.0)),
        ("(250,500),(750,1000)", "thousand", (200, 100), False, (50.0, 50.0, 150.0, 100.0)),
        # A wide picture has bars above and below: 50 each
        ("[0, 0.25, 1, 0.75]", "unit", (200, 100), True, (0.0, 0.0, 200.0, 100.0)),
        # A high one has them at its sides, and the odd column is at the right
        ("[0.2, 0, 0.8, 1]", "unit", (7, 10), True, (1.0, 0.0, 7.0, 10.0)),
        ("[0, 0.2, 1, 0.8]", "unit", (10, 7), True, (0.0, 1.0, 10.0, 7.0)),
        ("[60, 0, 110, 10]", "pixels", (100, 200), True, (10.0, 0.0, 60.0, 10.0)),
        ("[0, 0, 1000, 1000]", "thousand", (100, 100), True, (0.0, 0.0, 100.0, 100.0)),
        # A box may go beyond the picture, or be the wrong way round
        ("[-5, 1.5, 300, 0]", "pixels", (100, 50), False, (-5.0, 1.5, 300.0, 0.0)),
        # Words with digits are no numbers
        ('{"bbox_2d": [1, 2, 3, 4]}', "pixels", (9, 9), False, (1.0, 2.0, 3.0, 4.0)),
        ("x1=1, y1=2, x2=3, y2=4.", "pixels", (9, 9), False, (1.0, 2.0, 3.0, 4.0)),
        ("The box is [.1 1e-1 .5, 1.].", "unit", (10, 10), False, (1.0, 1.0, 5.0, 10.0)),
        # Anything but four finite numbers is no box
        ("", "unit", (10, 10), False, None),
        ("[0.1, 0.2, 0.3]", "unit", (10, 10), False, None),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", "unit", (10, 10), False, None),
        ("2 dogs: [0.1, 0.2, 0.3, 0.4]", "unit", (10, 10), False, None),
        ("[nan, 0.2, 0.3, 0.4]", "unit", (10, 10), False, None),
        ("[0.1, 0.2, 1e999, 0.4]", "unit", (10, 10), False, None),
        ("[0.1, 0.2, 1e308, 0.4]", "unit", (100, 10), False, None),
    ],
)
def test_read_box_gives_pixels_of_the_picture(
    text: str, scale: str, size: tuple[int, int], padded: bool, box: Box | None
) -> None:
    assert read_box(text, scale, size, padded) == (box and pytest.approx(box, abs=1e-12))


def test_read_box_refuses_an_unknown_scale_and_an_empty_picture() -> None:
    with pytest.raises(LayerfuseError, match="pixels, unit, thousand, not 'percent'"):
        read_box("[1, 2, 3, 4]", "percent", (10, 10), False)
    with pytest.raises(LayerfuseError, match="not 0 x 10"):
        read_box("[1, 2, 3, 4]", "unit", (0, 10), False)


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        # One square in common of four and four
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 4, 4), (1, 1, 3, 3), 4 / 16),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),
        ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
        # Without area, or the wrong way round, there is nothing to share
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),
        ((2, 0, 0, 2), (2, 0, 0, 2), 0.0),
    ],
)
def test_box_iou_divides_what_is_shared_by_what_is_covered(
    first: Box, second: Box, share: float
) -> None:
    assert box_iou(first, second) == share
    assert box_iou(second, first) == share


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
