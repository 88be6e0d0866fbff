"""RealWorldQA: questions with options in their words, and questions without."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS, Item
from layerfuse.evaluate.benchmarks.realworldqa import LETTER_LINE, WORD_LINE
from layerfuse.evaluate.suites import load_prompts
from tests.made_up_benchmarks import answer_all, png, png_text, values_of, write_parquet, write_tsv

CLOSED = f"Where is the car?\n\nA. Left\nB. Straight\nC. Right\n{LETTER_LINE}"
OPEN = f"How many lanes are there?\n{WORD_LINE}"


def load_hub(folder: Path, questions: Sequence[tuple[str, str]]) -> list[Item]:
    """Read some questions and their answers from a file as the hub has it."""
    records = [
        {"question": question, "answer": answer, "image": {"bytes": png()}}
        for question, answer in questions
    ]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", records)
    return BENCHMARKS["realworldqa"].load(folder)


def test_realworldqa_judges_letters_and_short_answers(tmp_path: Path):
    questions = ((CLOSED, "B"), (CLOSED, "C"), (OPEN, "2"), (OPEN, "No"), (OPEN, "A"))
    items = load_hub(tmp_path, questions)
    benchmark = BENCHMARKS["realworldqa"]
    assert [item.id for item in items] == ["0", "1", "2", "3", "4"]
    assert items[0].question == "Where is the car?"
    assert items[0].options == ("Left", "Straight", "Right")
    assert items[2].question == "How many lanes are there?"
    assert items[2].options == ()
    answers = {"0": "B. Straight", "1": "left", "2": "12", "3": "no.", "4": "a"}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    assert [each.judged.score for each in answered] == [1, 0, 0, 1, 1]
    assert [each.judged.parsed for each in answered] == ["B", "A", "12", "no", "a"]
    assert benchmark.judge(items[2], " ").parsed is None
    assert values_of(benchmark, answered) == {"accuracy": 60}
    assert benchmark.notes(items) == []


def test_realworldqa_takes_words_for_numbers(tmp_path: Path):
    (digit, word) = load_hub(tmp_path, [(OPEN, "2"), (OPEN, "Two")])
    for item in (digit, word):
        # As the filter of lmms-eval does, whichever of the two is in the file.
        assert BENCHMARKS["realworldqa"].judge(item, "Two.").score == 1
        assert BENCHMARKS["realworldqa"].judge(item, "2").score == 1
        assert BENCHMARKS["realworldqa"].judge(item, "twelve").score == 0


@pytest.mark.parametrize("prompts", ["llava-1.5", "llava-1.5-no-ocr"])
def test_realworldqa_is_asked_with_its_own_closing_line(prompts: str, tmp_path: Path):
    """Once, and with that of its kind of question, as lmms-eval asks it."""
    closed, opened = load_hub(tmp_path, [(CLOSED, "B"), (OPEN, "2")])
    prompt = load_prompts(prompts)["realworldqa"]
    assert (closed.context, opened.context) == (LETTER_LINE, WORD_LINE)
    # The empty line before the options is not kept.
    assert prompt.ask(closed) == CLOSED.replace("\n\n", "\n")
    assert prompt.ask(opened) == OPEN


def test_realworldqa_reads_options_without_a_full_stop(tmp_path: Path):
    """Question 105 of the original has such an option; else its C would be none of the options."""
    text = f"A bus is how far?\nA. 15 meters\nB 35 meters\nC. 55 meters\n{LETTER_LINE}"
    (item,) = load_hub(tmp_path, [(text, "C")])
    # An article at the beginning of the question makes no option.
    assert item.question == "A bus is how far?"
    assert item.options == ("15 meters", "35 meters", "55 meters")
    assert BENCHMARKS["realworldqa"].judge(item, "C").score == 1


def test_realworldqa_judges_options_that_it_cannot_part_by_the_letter_alone(tmp_path: Path):
    asked = "How far?\nA. 15 meters\n(B) 35 meters\n(C) 55 meters"
    (item,) = load_hub(tmp_path, [(f"{asked}\n{LETTER_LINE}", "C")])
    # With the option A alone, no answer would be right.
    assert (item.question, item.options) == (asked, ())
    assert item.context == LETTER_LINE
    assert BENCHMARKS["realworldqa"].judge(item, "C.").score == 1
    assert BENCHMARKS["realworldqa"].judge(item, "A").score == 0


def test_realworldqa_is_read_from_a_table(tmp_path: Path):
    row = {"index": "0", "question": "Where?", "answer": "B", "image": png_text()}
    rows = [{**row, "A": "left", "B": "right"}, {**row, "index": "1", "A": "", "B": ""}]
    write_tsv(tmp_path / "RealWorldQA.tsv", rows)
    items = BENCHMARKS["realworldqa"].load(tmp_path)
    assert [item.options for item in items] == [("left", "right"), ()]
    # The table has no closing lines, so that without these a model would answer in sentences.
    assert [item.context for item in items] == [LETTER_LINE, WORD_LINE]
    assert BENCHMARKS["realworldqa"].judge(items[0], "right").score == 1
    rows[1]["answer"] = ""
    write_tsv(tmp_path / "RealWorldQA.tsv", rows)
    with pytest.raises(LayerfuseError, match="question 1 has no answer"):
        BENCHMARKS["realworldqa"].load(tmp_path)


def test_realworldqa_notes_questions_whose_right_option_the_table_lacks(tmp_path: Path):
    row = {"question": "How far?", "image": png_text(), "A": "15 meters", "B": "55 meters"}
    rows = [{**row, "index": "104", "answer": "B"}, {**row, "index": "105", "answer": "C"}]
    write_tsv(tmp_path / "RealWorldQA.tsv", rows)
    benchmark = BENCHMARKS["realworldqa"]
    items = benchmark.load(tmp_path)
    (note,) = benchmark.notes(items)
    assert note.startswith("the right option is missing from 1 of the 2 questions")
    assert note.endswith(": 105")
    assert benchmark.judge(items[1], "C").score == 0
