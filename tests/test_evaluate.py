"""Questions, exact match, and predictions that do not depend on batching."""

from typing import Any

import pytest
import torch
from PIL import Image

from layerfuse.data.picture import Picture
from layerfuse.data.sample import Sample
from layerfuse.evaluate.answer import Answerer, predict, questions
from layerfuse.evaluate.metrics import exact_match, scores
from layerfuse.recipe.schema import Data, Evaluation
from tests import tiny
from tests.made_up import answer_record


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("Red.", "red", True),
        ("  two\nwords ", "two words", True),
        ("3", "3", True),
        ("13", "3", False),
        ("red circle", "red", False),
        ("", "none", False),
    ],
)
def test_exact_match(prediction: str, answer: str, same: bool) -> None:
    assert exact_match(prediction, answer) == float(same)


def test_scores_average_over_families() -> None:
    """Three colours at 2/3 and one count at 0: the mean is 1/3, not 1/2."""
    rows = [
        answer_record("1", sample="a", family="colour", right=True),
        answer_record("2", sample="a", family="colour", right=True),
        answer_record("3", sample="b", family="colour", right=False, novel=True),
        answer_record("4", sample="b", family="count", right=False),
    ]
    found = scores(rows)
    assert found["mean"] == pytest.approx(1 / 3)
    assert found["families"] == {"colour": pytest.approx(2 / 3), "count": 0}
    assert found["categories"] == {"all": 0.5}
    assert (found["novel"], found["seen"]) == (0, pytest.approx(2 / 3))


def talk(*said: str) -> tuple[dict[str, str], ...]:
    return tuple(
        {"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)
    )


def test_every_turn_is_asked_on_its_own_with_all_pictures() -> None:
    pictures = (Picture("a"), Picture("b"))
    system = ({"role": "system", "content": "Be brief."},)
    sample = Sample("s", pictures, system + talk("<image>first<image>", "1", "second", " 2 "))
    found = list(questions([sample]))
    assert [q.id for q in found] == ["s/0", "s/1"]
    assert [q.answer for q in found] == ["1", "2"]
    assert found[0].messages[-1]["content"] == "<image>first<image>"
    assert found[1].messages[-1]["content"] == "<image><image>\nsecond"
    assert all(q.messages[0]["content"] == "Be brief." for q in found)


def test_questions_of_samples_with_one_id_are_told_apart() -> None:
    samples = [Sample("a.png", (), talk("one", "1")), Sample("a.png", (), talk("two", "2"))]
    assert [q.id for q in questions(samples)] == ["a.png/0", "a.png/1"]


def test_predictions_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    model = tiny.model("inject_add", encoder="dinov2")
    processor = tiny.processor(model)
    samples = []
    for k in range(3):
        stream = Image.effect_noise((40, 30), 30.0 * k + 1).convert("RGB")
        import io

        data = io.BytesIO()
        stream.save(data, "PNG")
        asked = talk("<image>what is it?", "a", "and the other longer question?", "b")
        samples.append(Sample(str(k), (Picture(f"p{k}", data.getvalue),), asked))
    samples.append(Sample("text", (), talk("no picture?", "c")))
    how: dict[str, Any] = {"data": Data(path="held out")}
    one, many, short = (
        predict(
            Answerer(model, processor),
            samples,
            Evaluation(**how, batch_size=n, max_new_tokens=tokens),
        )
        for n, tokens in ((1, 4), (7, 4), (7, 1))
    )
    assert all(a.prediction.startswith(b.prediction) for a, b in zip(one, short, strict=True))
    assert any(a.prediction != b.prediction for a, b in zip(one, short, strict=True))
    assert [r.prediction for r in one] == [r.prediction for r in many]
    assert [r.id for r in one] == ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1", "text/0"]
    assert one[0].question == "what is it?"
