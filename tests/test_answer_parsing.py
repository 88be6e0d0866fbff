"""Option letters and boxes, as they are read in what a model says."""

from typing import Any

import pytest
from pydantic import ValidationError

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer_parsing import (
    option_letter,
    scienceqa_letter,
    strict_option_letter,
)
from layerfuse.evaluate.boxes import Box, BoxForm, box_iou, is_off_scale, read_box

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
        ("The answer should be B.", "B"),
        ("The answer must be (B)", "B"),
        ("Answer is probably B", "B"),
        ("The answer to the question is B.", "B"),
        ("Answer - B", "B"),
        ("I'd go with B", "B"),
        ("B is my answer", "B"),
        ("ASSISTANT: B", "B"),
        ("Assistant:B", "B"),
        ("`B`", "B"),
        ("$B$", "B"),
        ("B…", "B"),
        ("B : cat", "B"),
        ("B=cat", "B"),
        ("\u200bB\ufeff", "B"),
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
        ("The answer should be a", None),
        ("The answer should be a horse", None),
        ("I'd go with a horse", None),
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
        ("The answer should be A or B", None),
        ("`A` or `B`", None),
        ("**A** or **B**", None),
        ("'A' and 'B'", None),
        ("The answer is A. No, the answer is B.", None),
        ("Option A or option B", None),
        ("B, not A", None),
        ("A. dog B. cat C. a bird D. two cats", None),
        ("B: dog", None),
        ("The answer is (B) dog", None),
        # A conclusion
        ("I think B", "B"),
        ("I believe (B).", "B"),
        ("A cat is shown, so B", "B"),
        ("It has whiskers. Therefore, B.", "B"),
        ("I think a cat", None),
        ("I think B or C", None),
        # An explanation below the answer speaks of the other options
        ("B. cat\n\nExplanation: A. dog has other ears", "B"),
        ("B\n**Reasoning:** C. a bird would have wings", "B"),
        ("Explanation: it has whiskers.\nAnswer: B", "B"),
        ("B or C\nExplanation: B", None),
    ],
)
def test_option_letter_reads_one_option_or_none(answer: str, letter: str | None) -> None:
    assert option_letter(answer, ANIMALS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("答案是B", "B"),
        ("正确答案：B", "B"),
        ("答案为 B。", "B"),
        ("答案应该是选项B", "B"),
        ("选项B", "B"),
        ("我选择B。", "B"),
        ("选 B", "B"),
        ("（B）", "B"),
        ("答案是狗", "B"),
        # Two options, or none.
        ("选择A和B", None),
        ("答案是A，也可能是选项B", None),
        ("答案不知道", None),
    ],
)
def test_option_letter_reads_chinese(answer: str, letter: str | None) -> None:
    assert option_letter(answer, ["猫", "狗", "鸟"]) == letter


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
        ("[nan, 0.1, 0.2, 0.3, 0.4]", "unit", (10, 10), False, None),
        ("[0.1, 0.2, 0.3, 0.4, -Inf]", "unit", (10, 10), False, None),
        ("[0.1, 0.2, 1e999, 0.4]", "unit", (10, 10), False, None),
        ("[0.1, 0.2, 1e308, 0.4]", "unit", (100, 10), False, None),
    ],
)
def test_read_box_gives_pixels_of_the_picture(
    text: str, scale: Any, size: tuple[int, int], padded: bool, box: Box | None
) -> None:
    form = BoxForm(scale=scale, padded=padded)
    assert read_box(text, form, size) == (box and pytest.approx(box, abs=1e-12))


def test_read_box_refuses_an_unknown_scale_and_an_empty_picture() -> None:
    with pytest.raises(ValidationError, match="'unit', 'pixels' or 'thousand'"):
        BoxForm.model_validate({"scale": "percent"})
    with pytest.raises(LayerfuseError, match="not 0 x 10"):
        read_box("[1, 2, 3, 4]", BoxForm(), (0, 10))


@pytest.mark.parametrize(
    ("text", "scale", "off"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", "unit", False),
        # A box may go beyond the picture
        ("[0.1, 0.2, 1.2, 2]", "unit", False),
        ("[10, 20, 30, 40]", "unit", True),
        ("[0, 0, 1, 2.1]", "unit", True),
        ("[10, 20, 30, 40]", "pixels", False),
        ("[10, 20, 30, 40]", "thousand", False),
        # No box at all
        ("10, 20", "unit", False),
        ("", "unit", False),
    ],
)
def test_numbers_far_above_one_are_no_shares_of_a_picture(text: str, scale: Any, off: bool) -> None:
    assert is_off_scale(text, BoxForm(scale=scale)) == off


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
