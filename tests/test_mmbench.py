"""MMBench: questions that are asked once for each rotation of their options."""

from pathlib import Path

import pytest

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS
from tests.made_up_benchmarks import answer_all, columns_of, png, png_text, write_tsv


def mmbench_rows() -> list[dict[str, str]]:
    """Two questions, of three and of two options, and one of the test split."""
    rows: list[dict[str, str]] = []
    questions = (("7", ("red", "green", "blue"), "AR"), ("30", ("left", "right"), "LR"))
    for index, options, broad in questions:
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            row = {
                "index": str(int(index) + 1000000 * turn),
                "question": "Which?",
                "hint": "" if index == "7" else "Look.",
                **dict(zip("ABCD", [*turned, "", ""], strict=False)),
                "answer": "ABC"[turned.index(options[1])],
                "category": "colour",
                "l2-category": broad,
                # Rotations name the row that has the picture.
                "image": png_text(int(index)) if turn == 0 else index,
                "split": "dev",
            }
            row.setdefault("D", "")
            rows.append(row)
    # Some files hold both splits.
    rows.append({**rows[0], "index": "50", "answer": "", "split": "test"})
    return rows


def test_mmbench_is_right_only_where_every_rotation_is(tmp_path: Path):
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", mmbench_rows())
    benchmark = BENCHMARKS["mmbench"]
    items = benchmark.load(tmp_path)
    assert [item.id for item in items] == ["7", "1000007", "2000007", "30", "1000030"]
    assert [len(item.options) for item in items] == [3, 3, 3, 2, 2]
    assert items[2].pictures == items[0].pictures
    assert items[2].pictures[0].read() == png(7)
    assert items[3].context == "Look."
    # The second rotation of the first question is wrong; the others name letters or options.
    answers = {"7": "B", "1000007": "B", "2000007": "(C)", "30": "right", "1000030": "A."}
    answered = answer_all(benchmark, items, lambda item: answers[item.id])
    assert [each.judged.score for each in answered] == [1, 0, 1, 1, 1]
    columns = columns_of(benchmark, answered)
    values = {name: column.value for name, column in columns.items()}
    assert values == {"circular": 50, "plain": 100, "AR": 0, "LR": 100}
    assert [column.questions for column in columns.values()] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        ("mmbench", "MMBench_DEV_EN.tsv"),
        ("mmbench", "MMBench_DEV_EN_V11.tsv"),
        ("mmbench", "mmbench_dev_20230712.tsv"),
        ("mmbench", "mmbench_dev_en_20231003.tsv"),
        ("mmbench-cn", "MMBench_DEV_CN.tsv"),
        ("mmbench-cn", "mmbench_dev_cn_20231003.tsv"),
    ],
)
def test_mmbench_is_read_under_each_name_of_its_file(benchmark: str, name: str, tmp_path: Path):
    write_tsv(tmp_path / name, mmbench_rows())
    assert len(BENCHMARKS[benchmark].load(tmp_path)) == 5
    # The other language's file is none of it.
    other = {"mmbench": "mmbench-cn", "mmbench-cn": "mmbench"}[benchmark]
    with pytest.raises(LayerfuseError, match="expected"):
        BENCHMARKS[other].load(tmp_path)


def test_mmbench_refuses_a_question_without_a_rotation(tmp_path: Path):
    file = tmp_path / "mmbench_dev_20230712.tsv"
    rows = mmbench_rows()
    # With one rotation less, the question would be right more often.
    write_tsv(file, rows[:2] + rows[3:])
    words = "question 7 with 3 options under the indices 7, 1000007; 7, 1000007, 2000007 are"
    with pytest.raises(LayerfuseError, match=words):
        BENCHMARKS["mmbench"].load(tmp_path)
    write_tsv(file, [*rows, rows[1]])
    with pytest.raises(LayerfuseError, match="same id '1000007'"):
        BENCHMARKS["mmbench"].load(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("answer", "D", "answer 'D' to the question 7, whose options are A, B, C"),
        ("answer", "", "a split without answers"),
        ("image", "8", "'8' for the picture of row 7; base64 or the index"),
        ("image", png_text()[:-2], "not valid base64"),
        ("split", "test", "7 with 3 options under the indices 1000007, 2000007; 7,"),
    ],
)
def test_mmbench_refuses_what_does_not_fit(column: str, value: str, words: str, tmp_path: Path):
    rows = mmbench_rows()
    rows[0][column] = value
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    with pytest.raises(LayerfuseError, match=words):
        BENCHMARKS["mmbench"].load(tmp_path)


def test_mmbench_refuses_half_a_file(tmp_path: Path):
    file = tmp_path / "MMBench_DEV_EN.tsv"
    write_tsv(file, mmbench_rows())
    text = file.read_text()
    file.write_text(text[: text.index("left") + 2])
    with pytest.raises(LayerfuseError, match="cut off"):
        BENCHMARKS["mmbench"].load(tmp_path)
