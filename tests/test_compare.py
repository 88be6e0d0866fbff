"""Runs that are compared: by hand, and by resamples of a naive reference."""

import io
import json
import math
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.benchmarks import BENCHMARKS, Item
from layerfuse.evaluate.benchmarks.interface import Judged, JudgedItem
from layerfuse.evaluate.benchmarks.mme import COGNITION, PERCEPTION
from layerfuse.evaluate.benchmarks.pope import SPLITS
from layerfuse.evaluate.category_scores import CategoryScore, category_scores
from layerfuse.evaluate.compare import Comparison, Difference, compare, mcnemar
from layerfuse.evaluate.compare_table import (
    comparison_table,
)
from layerfuse.evaluate.redrawing import clusters_of_items, redraw
from layerfuse.evaluate.run_answers import Run
from layerfuse.evaluate.suite_scores import UnreadAnswers
from layerfuse.evaluate.suites import load_suite
from layerfuse.vision.picture import Picture
from tests.compared import REAL, mme_answers, right_answers, run_of
from tests.made_up_benchmarks import (
    column,
    columns_of,
    suite_of,
    write_lines,
    write_mme,
    write_ocrbench,
    write_realmix,
    write_refcoco,
    write_scienceqa,
)


def compare_quickly(*args: Any, **options: Any) -> Comparison:
    return compare(*args, **{"resamples": 100, **options})


# By hand


def test_questions_about_one_picture_have_no_interval_and_no_mark(tmp_path: Path) -> None:
    """Redrawn, one picture is itself: no difference could be told from chance."""
    write_realmix(tmp_path / "realmix", 12, pictures=False)
    shared = tmp_path / "realmix" / "test.json"
    samples = json.loads(shared.read_text())
    for sample in samples:
        sample["image"] = samples[0]["image"]
    shared.write_text(json.dumps(samples))
    first = right_answers(12, lambda _: False)
    second = right_answers(12, lambda _: True)
    runs = [run_of(tmp_path, name, "realmix", a) for name, a in (("a", first), ("b", second))]

    comparison = compare_quickly(runs, REAL, tmp_path)

    b = comparison.runs[1]
    assert b.average == 75
    assert b.average_difference is None
    assert [cell.difference for cell in b.cells.values()] == [None, None]
    assert any("all questions hang together" in note for note in comparison.notes)


def test_scores_and_differences_by_hand(tmp_path: Path) -> None:
    """Twelve questions; even ones count. The first run has all but 0, 2 and 1; the second has the
    even ones and 1."""
    write_realmix(tmp_path / "realmix", 12, pictures=False)
    first = right_answers(12, lambda number: number > 2)
    second = right_answers(12, lambda number: number % 2 == 0 or number == 1)
    runs = [run_of(tmp_path, name, "realmix", a) for name, a in (("a", first), ("b", second))]

    comparison = compare_quickly(runs, REAL, tmp_path)

    a, b = comparison.runs
    assert comparison.baseline == "a"
    assert (a.cells["counting"].value, b.cells["counting"].value) == (pytest.approx(200 / 3), 100)
    assert a.cells["colour"].value == pytest.approx(500 / 6)
    assert b.cells["colour"].value == pytest.approx(100 / 6)
    assert a.average == pytest.approx((200 / 3 + 500 / 12) / 2)
    assert b.average == pytest.approx((100 + 100 / 12) / 2)
    counting = b.cells["counting"].difference
    colour = b.cells["colour"].difference
    assert counting is not None
    assert colour is not None
    assert counting.difference == pytest.approx(100 / 3)
    assert (counting.better, counting.worse, counting.mcnemar) == (2, 0, 0.5)
    assert colour.difference == pytest.approx(-400 / 6)
    # 3, 5, 7, 9 and 11 against 1: 2 · (1 + 6) / 2⁶.
    assert (colour.better, colour.worse) == (1, 5)
    assert colour.mcnemar == pytest.approx(14 / 64)
    assert b.average_difference is not None
    expected = (100 + 100 / 12 - 200 / 3 - 500 / 12) / 2
    assert b.average_difference.difference == pytest.approx(expected)
    # The average's own p: it is one number, and no column is like it.
    assert b.average_difference.p_holm == b.average_difference.p
    assert a.average_difference is None
    assert all(cell.difference is None for cell in a.cells.values())


def test_the_baseline_is_chosen(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    runs = [
        run_of(tmp_path, "a", "realmix", right_answers(6, lambda number: number > 1)),
        run_of(tmp_path, "b", "realmix", right_answers(6, lambda number: True)),
    ]

    of_a = compare_quickly(runs, REAL, tmp_path, baseline="b").runs[0].cells["counting"].difference

    assert of_a is not None
    assert of_a.difference == pytest.approx(-100 / 3)
    with pytest.raises(LayerfuseError, match="the baseline 'c' is no run; valid: a, b"):
        compare_quickly(runs, REAL, tmp_path, baseline="c")
    with pytest.raises(LayerfuseError, match="two runs are called 'a': name them by NAME=FOLDER"):
        compare_quickly([runs[0], runs[0]], REAL, tmp_path)


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    answers = right_answers(6, lambda number: number < 3)
    runs = [run_of(tmp_path, name, "realmix", answers) for name in "ab"]

    comparison = compare_quickly(runs, REAL, tmp_path)

    for cell in comparison.runs[1].cells.values():
        assert cell.difference == Difference(0, (0, 0), 1, 1, 0, 0, 1)
    scores = category_scores(comparison)
    assert scores["looks"]["b"] == CategoryScore(1, None)


def pope_answers(folder: Path, name: str, wrong: Mapping[str, str]) -> Run:
    """Ask POPE's three splits about eight things each, of which the first four are there, and
    answer all rightly but some, by the id."""
    answers: dict[str, str] = {}
    for split in SPLITS:
        rows: list[dict[str, Any]] = []
        for number in range(8):
            label = "yes" if number < 4 else "no"
            image = ["a.jpg", "b.jpg"][number % 2]
            text = f"Is there thing {number}?"
            rows.append({"question_id": number, "image": image, "text": text, "label": label})
            answers[f"{split}/{number}"] = label
        write_lines(folder / "pope" / f"coco_pope_{split}.json", rows)
    return run_of(folder, name, "pope", {**answers, **wrong})


def test_mcnemar_is_of_the_mean_of_answers_alone(tmp_path: Path) -> None:
    """The first run misses a thing of the random split, the second sees two that are not there."""
    runs = [
        pope_answers(tmp_path, "a", {"random/0": "no"}),
        pope_answers(tmp_path, "b", {"random/6": "yes", "random/7": "yes"}),
    ]
    suite = suite_of(
        column("F1", "pope"),
        column("accuracy", "pope", column="accuracy"),
        column("random accuracy", "pope", column="random accuracy"),
        column("random recall", "pope", column="random recall"),
    )

    cells = compare_quickly(runs, suite, tmp_path).runs[1].cells

    differences = {name: cell.difference for name, cell in cells.items()}
    for name in ("accuracy", "random accuracy"):
        found = differences[name]
        assert found is not None
        assert (found.better, found.worse, found.mcnemar) == (1, 2, 1.0)
    # F1 falls by other answers than accuracy.
    for name in ("F1", "random recall"):
        found = differences[name]
        assert found is not None
        assert (found.better, found.worse, found.mcnemar) == (None, None, None)


def test_mcnemar_is_over_the_questions_of_a_category(tmp_path: Path) -> None:
    """Two of ScienceQA's four made-up questions have a picture: no group is called so."""
    write_scienceqa(tmp_path / "scienceqa")
    runs = [
        run_of(tmp_path, "a", "scienceqa", {"0": "A", "1": "B", "2": "B", "3": "B"}),
        run_of(tmp_path, "b", "scienceqa", {"0": "B", "1": "A", "2": "B", "3": "A"}),
    ]
    suite = suite_of(column("SQA-I", "scienceqa", column="image accuracy"))

    found = compare_quickly(runs, suite, tmp_path).runs[1].cells["SQA-I"].difference

    assert found is not None
    assert (found.better, found.worse) == (1, 0)


def judged_of(groups: Mapping[str, int]) -> list[JudgedItem]:
    """So many answers of each group, of which the first is wrong."""
    judged: list[JudgedItem] = []
    for group, count in groups.items():
        for number in range(count):
            picture = Picture(f"{group} {number}.jpg")
            item = Item(f"{group}/{number}", (picture,), "?", ("a cup",), group=group)
            said = "a dog" if number == 0 else "a cup"
            judged.append(JudgedItem(item, Judged(said, float(number > 0))))
    return judged


@pytest.mark.parametrize(
    ("benchmark", "groups", "means"),
    [
        ("ocrbench", {"Doc-oriented VQA": 3}, {"score": 3, "Doc-oriented VQA": 3}),
        ("refcocog-captions", {"val": 2, "test": 2}, {}),
        # Of groups of different sizes not all answers weigh the same.
        ("realmix", {"counting": 2, "colour": 3}, {"counting": 2, "colour": 3}),
        ("realmix", {"counting": 3, "colour": 3}, {"mean": 6, "counting": 3, "colour": 3}),
        (
            "cvbench",
            {"ADE20K/Count": 2, "COCO/Count": 2, "Omni3D/Depth": 3},
            {"2D": 4, "3D": 3, "ADE20K": 2, "COCO": 2, "Omni3D": 3, "Count": 4, "Depth": 3},
        ),
    ],
)
def test_columns_know_of_which_answers_they_are_the_mean(
    benchmark: str, groups: dict[str, int], means: dict[str, int]
) -> None:
    judged = judged_of(groups)

    columns = columns_of(BENCHMARKS[benchmark], judged)

    found = {name: len(column.mean_of) for name, column in columns.items() if column.mean_of}
    assert found == means


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (8, 1), (5, 5), (3, 17)])
def test_mcnemar_is_the_sum_of_both_tails(better: int, worse: int) -> None:
    number = better + worse
    tail = sum(math.comb(number, k) for k in range(min(better, worse) + 1)) / 2**number
    assert mcnemar(better, worse) == pytest.approx(min(1, 2 * tail))


# Resamples


def naive_perception(answers: Mapping[str, str], drawn: list[str]) -> float:
    """MME's perception over drawn pictures, each of which counts by itself."""
    total = 0.0
    for task in PERCEPTION:
        of_task = [picture for picture in drawn if picture.startswith(f"{task}/")]
        right = 0
        both = 0
        for picture in of_task:
            first = answers[f"{picture}/1"] == "Yes"
            second = answers[f"{picture}/2"] == "No"
            right += first + second
            both += first and second
        total += 100 * right / (2 * len(of_task)) + 100 * both / len(of_task)
    return total


def test_resamples_are_those_of_a_naive_reference(tmp_path: Path) -> None:
    """MME judges both questions about a picture together: a picture that is drawn twice is two."""
    write_mme(tmp_path / "mme", 3)
    first, second = mme_answers(0, 0.6, 3), mme_answers(1, 0.8, 3)
    runs = [run_of(tmp_path, name, "mme", a) for name, a in (("a", first), ("b", second))]
    suite = suite_of(column("MME", "mme", divide=20), average=None)

    comparison = compare(runs, suite, tmp_path, resamples=200, seed=5)

    pictures = list(dict.fromkeys(id.rpartition("/")[0] for id in first))
    draws = np.random.default_rng([5, zlib.crc32(b"mme")])
    differences: list[float] = []
    while len(differences) < 200:
        chosen = draws.integers(len(pictures), size=len(pictures))
        drawn = [pictures[place] for place in chosen]
        tasks = {picture.partition("/")[0] for picture in drawn}
        # A task without a picture has no score.
        if len(tasks) == len(PERCEPTION + COGNITION):
            differences.append(naive_perception(second, drawn) - naive_perception(first, drawn))
    found = comparison.runs[1].cells["MME"].difference
    assert found is not None
    assert found.difference == pytest.approx(
        naive_perception(second, pictures) - naive_perception(first, pictures)
    )
    assert found.interval == pytest.approx(np.quantile(differences, [0.025, 0.975]).tolist())
    below = sum(difference <= 0 for difference in differences)
    above = sum(difference >= 0 for difference in differences)
    assert found.p == pytest.approx(2 * (1 + min(below, above)) / 201)
    # Both questions about a picture: McNemar's test would be on other numbers than the score.
    assert found.mcnemar is None


def test_means_are_never_over_fewer_groups_than_the_benchmark_has(tmp_path: Path) -> None:
    """Three pictures count and one has colours: a draw without it would be of another benchmark."""
    categories = ["counting", "counting", "counting", "colour"]
    write_realmix(tmp_path / "realmix", 4, pictures=False, categories=categories)
    first = right_answers(4, lambda number: number == 0)
    second = right_answers(4, lambda number: number > 0)
    runs = [run_of(tmp_path, name, "realmix", a) for name, a in (("a", first), ("b", second))]

    comparison = compare(runs, suite_of(column("mean", "realmix")), tmp_path, resamples=100)

    draws = np.random.default_rng([0, zlib.crc32(b"realmix")])
    differences: list[float] = []
    while len(differences) < 100:
        chosen = draws.integers(4, size=4).tolist()
        counting = [place for place in chosen if place < 3]
        if 3 in chosen and counting:
            won = [1 if place > 0 else -1 for place in counting]
            # All of colour is won, however often it is drawn.
            differences.append(100 * (sum(won) / len(won) + 1) / 2)
    found = comparison.runs[1].cells["mean"].difference
    assert found is not None
    assert found.interval == pytest.approx(np.quantile(differences, [0.025, 0.975]).tolist())
    assert found.difference == pytest.approx(100 * (1 / 3 + 1) / 2)


def test_intervals_are_as_wide_as_theory_has_them(tmp_path: Path) -> None:
    """Of 200 pictures 60 are won and 20 lost: the difference is 20 % with a known error."""
    write_realmix(tmp_path / "realmix", 400, pictures=False)
    # The even ones count: 0, 2, ..., 118 are won, 120, ..., 158 lost.
    answers = [
        right_answers(400, lambda number: 120 <= number < 160),
        right_answers(400, lambda number: number < 120),
    ]
    runs = [run_of(tmp_path, name, "realmix", a) for name, a in zip("ab", answers, strict=True)]

    found = compare(runs, REAL, tmp_path, resamples=1000).runs[1].cells["counting"].difference

    assert found is not None
    error = 100 * math.sqrt((80 / 200 - 0.2**2) / 200)
    assert found.difference == pytest.approx(20)
    assert found.interval == pytest.approx((20 - 1.96 * error, 20 + 1.96 * error), abs=1.2)
    assert found.p == pytest.approx(2 / 1001)
    assert found.mark == "+"


def test_p_values_are_corrected_for_the_columns(tmp_path: Path) -> None:
    """Holm: the smaller of two p values is doubled, the larger one stays, if it is larger still."""
    write_realmix(tmp_path / "realmix", 80, pictures=False)
    answers = [
        right_answers(80, lambda number: number < 20),
        right_answers(80, lambda number: number % 2 == 0 or number < 5),
    ]
    runs = [run_of(tmp_path, name, "realmix", a) for name, a in zip("ab", answers, strict=True)]

    cells = compare(runs, REAL, tmp_path, resamples=500).runs[1].cells

    differences = sorted(
        (cell.difference for cell in cells.values() if cell.difference is not None),
        key=lambda difference: difference.p,
    )
    assert len(differences) == 2
    smaller, larger = differences
    assert smaller.p_holm == pytest.approx(2 * smaller.p)
    assert larger.p_holm == max(larger.p, smaller.p_holm)


@pytest.mark.parametrize(
    ("difference", "p", "mark"),
    [
        (3.0, 0.04, "+"),
        (-3.0, 0.04, "-"),
        (3.0, 0.06, ""),
        (-3.0, 1.0, ""),
        # What is printed is p < 0.05.
        (3.0, 0.05, ""),
        (3.0, 7 * (2 / 280), ""),
    ],
)
def test_marks_are_by_the_corrected_p(difference: float, p: float, mark: str) -> None:
    assert Difference(difference, (0, 0), p=0.001, p_holm=p).mark == mark


def test_benchmarks_are_redrawn_independently(tmp_path: Path) -> None:
    """With the same draws, two benchmarks alike would make the average as noisy as one of them."""
    write_realmix(tmp_path / "realmix", 40, pictures=False, categories=["counting"])
    write_ocrbench(tmp_path / "ocrbench", 40)
    suite = suite_of(column("mean", "realmix"), column("OCR", "ocrbench", divide=0.4))
    runs: list[Run] = []
    for place, name in enumerate("ab"):
        answers = right_answers(40, lambda number, place=place: (number + place) % 2 == 0)
        of_ocr = {f"{number + 1}-made": said for number, said in enumerate(answers.values())}
        run_of(tmp_path, name, "ocrbench", of_ocr)
        runs.append(run_of(tmp_path, name, "realmix", answers))

    second = compare(runs, suite, tmp_path, resamples=1000).runs[1]

    def width(difference: Difference | None, scale: float = 1.0) -> float:
        assert difference is not None
        return (difference.interval[1] - difference.interval[0]) / scale

    # The same questions are right in both: of independent draws the mean varies less by √2.
    of_one = width(second.cells["mean"].difference)
    assert width(second.cells["OCR"].difference, 0.4) == pytest.approx(of_one, rel=0.15)
    assert width(second.average_difference) == pytest.approx(of_one / math.sqrt(2), rel=0.1)
    # In whatever order.
    reordered = suite.model_copy(update={"columns": suite.columns[::-1]})
    assert compare(runs, reordered, tmp_path, resamples=1000).runs[1].cells == second.cells


def test_redrawn_captions_lie_around_their_score() -> None:
    """A reference that is drawn twice does not make its words less rare, in every draw."""
    pytest.importorskip("pycocoevalcap.cider.cider")
    captions = BENCHMARKS["refcocog-captions"]
    words = ["red", "blue", "small", "large", "cup", "plate", "dog", "table", "left", "near"]
    chosen = random.Random(0)
    judged: list[JudgedItem] = []
    for number in range(60):
        said = " ".join(chosen.sample(words, 5))
        # A word of the reference is another one.
        reference = f"{said.rpartition(' ')[0]} thing"
        picture = Picture(f"{number}.jpg")
        item = Item(str(number), (picture,), "?", (reference,), group="val")
        judged.append(JudgedItem(item, captions.judge(item, said)))
    (suite_column,) = suite_of(column("CIDEr", captions.name, column="val")).columns

    drawn = redraw([suite_column], captions, {"a": judged}, resamples=100, seed=0)

    observed = columns_of(captions, judged)["val"].value
    low, middle, high = np.quantile(drawn.values["a"]["CIDEr"], [0, 0.5, 1])
    assert low < observed < high
    assert middle == pytest.approx(observed, rel=0.01)


def test_what_is_judged_together_is_redrawn_together() -> None:
    def item(id: str, *pictures: Picture, together: str = "") -> Item:
        return Item(id, pictures, "what?", ("a",), together=together)

    def in_memory(name: str, shade: int) -> Picture:
        """A row's own picture, as tables hold it."""
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
        return Picture(name, file.getvalue)

    items = [
        item("0", Picture("gone.jpg")),
        item("1", Picture("other.jpg"), together="pair"),
        item("2"),
        item("3", Picture("gone.jpg"), Picture("third.jpg")),
        item("4", together="pair"),
        item("5", in_memory("row 5", 1)),
        item("6", in_memory("row 6", 1)),
        item("7", in_memory("row 7", 2)),
        item("8"),
    ]
    expected = [0, 1, 2, 0, 1, 3, 3, 4, 5]
    assert clusters_of_items(BENCHMARKS["realmix"], items) == expected


def test_figures_of_a_set_are_redrawn_together() -> None:
    """HallusionBench's qAcc is over all figures of a set, whose pictures differ."""
    items: list[Item] = []
    for together in ("VD/chart/3/0", "VD/chart/3/1", "VD/chart/4/0", "VS/chart/3/1"):
        picture = Picture(f"{together}.png")
        items.append(Item(f"{together}/0", (picture,), "?", ("yes",), together=together))
    assert clusters_of_items(BENCHMARKS["hallusionbench"], items) == [0, 0, 1, 2]


def test_too_few_pictures_leave_out_the_differences_of_their_benchmark(tmp_path: Path) -> None:
    """A draw of fourteen pictures has all fourteen tasks once in a hundred thousand times."""
    write_mme(tmp_path / "mme", 1)
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    runs = [run_of(tmp_path, name, "mme", mme_answers(0, 0.5, 1)) for name in "ab"]
    for run in runs:
        run_of(tmp_path, run.name, "realmix", right_answers(6, lambda number: True))
    suite = suite_of(column("MME", "mme"), column("counting", "realmix", column="counting"))

    compared = compare_quickly(runs, suite, tmp_path)

    other = compared.runs[1].cells
    assert other["MME"].questions == 20
    assert other["MME"].difference is None
    assert other["counting"].difference is not None
    (note,) = [note for note in compared.notes if "too few" in note]
    assert note.startswith("MME has too few pictures, 14: redrawn")
    # A table of one run needs no resamples.
    assert compare_quickly(runs[:1], suite, tmp_path).runs[0].cells["MME"].questions == 20


def test_a_few_pictures_are_no_evidence(tmp_path: Path) -> None:
    """Redrawn, the two pictures that one model alone answers are always a difference."""
    write_realmix(tmp_path / "realmix", 2, pictures=False)
    right = run_of(tmp_path, "right", "realmix", right_answers(2, lambda number: True))
    wrong = run_of(tmp_path, "wrong", "realmix", right_answers(2, lambda number: False))

    compared = compare_quickly([right, wrong], REAL, tmp_path)

    difference = compared.runs[1].cells["counting"].difference
    assert difference is not None
    # Either falls to one model by chance: one in four, for either model.
    assert difference.p == 0.5
    assert difference.mark == ""
    assert any("over 2 pictures alone" in note for note in compared.notes)


def test_one_benchmark_has_all_its_numbers(tmp_path: Path) -> None:
    """As `eval` prints them: a file of answers needs no suite of one's own."""
    write_mme(tmp_path / "mme", 3)
    runs = [run_of(tmp_path, name, "mme", mme_answers(0, 0.6, 3)) for name in "ab"]
    suite = load_suite("mme")

    compared = compare_quickly(runs, suite, tmp_path)

    table = comparison_table(compared, suite)
    assert table.head[:2] == ["model", "perception"]
    cognition = table.head.index("cognition")
    for run, cells in zip(compared.runs, table.rows, strict=True):
        values = {column.name: column.value for column in compared.reported[run.name]}
        assert cells[cognition] == f"{values['cognition']:.1f}"
    # It alone is compared.
    assert list(compared.runs[1].cells) == ["perception"]


# What does not matter, and what is said


def test_the_order_of_answers_does_not_matter(tmp_path: Path) -> None:
    write_mme(tmp_path / "mme", 3)
    suite = suite_of(column("MME", "mme"))
    first, second = mme_answers(0, 0.6, 3), mme_answers(1, 0.8, 3)
    runs = [run_of(tmp_path, name, "mme", a) for name, a in (("a", first), ("b", second))]
    expected = compare_quickly(runs, suite, tmp_path)

    shuffled = list(second.items())
    random.Random(0).shuffle(shuffled)
    run_of(tmp_path, "b", "mme", dict(shuffled))

    assert compare_quickly(runs, suite, tmp_path) == expected
    assert compare_quickly(runs, suite, tmp_path, seed=1) != expected


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    write_mme(tmp_path / "mme", 1)
    answers = right_answers(6, lambda number: True)
    runs = [run_of(tmp_path, name, "realmix", answers) for name in "ab"]
    run_of(tmp_path, "b", "mme", mme_answers(0, 0.5, 1))
    suite = suite_of(
        column("counting", "realmix", column="counting"),
        column("MME", "mme"),
        column("MM-Vet", "mm-vet"),
        column("GQA", "gqa"),
    )

    comparison = compare_quickly(runs, suite, tmp_path)

    assert comparison.missing == {
        "MME": "no answers of a",
        "MM-Vet": "layerfuse does not score it",
        "GQA": "no run has answers to it",
    }
    # No average over fewer columns, and no difference to what is not there.
    assert [run.average for run in comparison.runs] == [None, None]
    assert comparison.runs[1].cells["MME"].difference is None
    assert list(category_scores(comparison)) == ["all"]
    table = comparison_table(comparison, suite)
    assert [row[2:] for row in table.rows] == [["", "", "", ""], [table.rows[1][2], "", "", ""]]
    assert "MME: no answers of a" in table.notes


def test_answers_that_say_nothing_are_counted(tmp_path: Path) -> None:
    """POPE reads yes in an empty answer, exact match nothing."""
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    answers = right_answers(6, lambda number: number > 1)
    runs = [run_of(tmp_path, "a", "realmix", right_answers(6, lambda number: True))]
    runs.append(run_of(tmp_path, "b", "realmix", {**answers, "q0/0": " "}))
    pope_answers(tmp_path, "a", {})
    pope_answers(tmp_path, "b", {"random/0": "", "random/7": "\n"})
    suite = suite_of(column("mean", "realmix"), column("F1", "pope"), average=None)

    comparison = compare_quickly(runs, suite, tmp_path)

    a, b = comparison.runs
    assert a.unread == {}
    assert b.unread == {"realmix": UnreadAnswers(6, 1, 1), "pope": UnreadAnswers(24, 0, 2)}
    notes = comparison_table(comparison, suite).notes
    assert "b, real pictures: of 6 answers nothing could be read in 1, 1 empty" in notes
    assert "b, POPE: of 24 answers 2 empty" in notes
    assert not any(note.startswith("a, ") for note in notes)


def test_a_run_without_answers_is_refused(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    answers = right_answers(6, lambda number: True)
    runs = [run_of(tmp_path, "a", "realmix", answers)]
    (tmp_path / "model").mkdir()
    with pytest.raises(LayerfuseError, match="model has no answers to a benchmark of suite 'mine'"):
        compare_quickly([*runs, Run("b", tmp_path / "model")], REAL, tmp_path)
    with pytest.raises(LayerfuseError, match="there are no runs"):
        compare_quickly([], REAL, tmp_path)


def test_different_prompts_are_said(tmp_path: Path) -> None:
    write_realmix(tmp_path / "realmix", 6, pictures=False)
    answers = right_answers(6, lambda number: True)
    runs: list[Run] = []
    for name, prompt in (("a", "{question}"), ("b", "Say: {question}"), ("c", "{question}")):
        folder = tmp_path / name / "realmix"
        write_lines(
            folder / "answers.jsonl", [{"id": id, "output": said} for id, said in answers.items()]
        )
        asked = {"prompt": {"text": prompt, "max_new_tokens": 16}}
        (folder / "asked.json").write_text(json.dumps(asked))
        runs.append(Run(name, tmp_path / name))
    # Of another tool nothing is known.
    runs.append(run_of(tmp_path, "d", "realmix", answers))

    notes = compare_quickly(runs, REAL, tmp_path).notes

    (note,) = [note for note in notes if "not all runs" in note]
    assert note.startswith("real pictures: not all runs were asked in the same way")
    assert note.endswith("Asked alike: a, c; b")
    for note in compare_quickly([runs[0], *runs[2:]], REAL, tmp_path).notes:
        assert "not all runs" not in note


def test_boxes_in_another_scale_are_said(tmp_path: Path) -> None:
    write_refcoco(tmp_path / "refcoco")
    items = BENCHMARKS["refcoco"].load(tmp_path / "refcoco")
    pixels = run_of(tmp_path, "new", "refcoco", {item.id: "[10, 5, 30, 25]" for item in items})
    shares = run_of(tmp_path, "old", "refcoco", {item.id: "[0.2, 0.2, 0.8, 0.8]" for item in items})

    suite = suite_of(column("RefCOCO", "refcoco"))
    compared = compare_quickly([shares, pixels], suite, tmp_path)

    (note,) = [note for note in compared.notes if "boxes.yaml" in note]
    assert note.startswith("new: RefCOCO: 3 of 3 answers are boxes with a number above")


@pytest.mark.parametrize(("mcnemar", "mark"), [(0.125, ""), (0.04, "+"), (None, "+")])
def test_mcnemars_test_must_agree_where_there_is_one(mcnemar: float | None, mark: str) -> None:
    """Four questions of fourteen that one model alone answers: resamples say 0.02, it 0.125."""
    difference = Difference(28.6, (7.1, 50), p=0.02, p_holm=0.04, mcnemar=mcnemar)
    assert difference.mark == mark
