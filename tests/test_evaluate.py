"""Questions, exact match, and predictions that do not depend on batching."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from layerfuse.data.collate import Collator
from layerfuse.data.picture import Picture
from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError
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
    assert found.mean == pytest.approx(1 / 3)
    assert found.families == {"colour": pytest.approx(2 / 3), "count": 0}
    assert found.categories == {"all": 0.5}
    assert found.by_novelty == {"seen": pytest.approx(2 / 3), "novel": 0}


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


def test_a_question_sees_no_picture_of_a_later_turn() -> None:
    a, b, c = (Picture(name) for name in "abc")
    said = ("no picture?", "0", "<image>one?", "1", "and now <image>?", "2 <image>", "all?", "3")
    found = list(questions([Sample("s", (a, b, c), talk(*said))]))
    assert [q.id for q in found] == ["s/0", "s/1", "s/2", "s/3"]
    assert [q.sample.pictures for q in found] == [(), (a,), (a, b), (a, b, c)]
    contents = [q.messages[-1]["content"] for q in found]
    assert contents == [
        "no picture?",
        "<image>one?",
        "<image><image>\nand now ?",
        "<image><image><image>\nall?",
    ]


def test_a_picture_in_the_systems_words_stays_there() -> None:
    a, b = Picture("a"), Picture("b")
    system = ({"role": "system", "content": "You know <image>."},)
    found = list(questions([Sample("s", (a, b), system + talk("who?", "1", "<image>?", "2"))]))
    assert [q.sample.pictures for q in found] == [(a,), (a, b)]
    assert [q.messages[-1]["content"] for q in found] == ["who?", "<image>?"]
    assert all(q.messages[0]["content"] == "You know <image>." for q in found)


def test_only_a_question_with_an_answer_is_asked() -> None:
    """An assistant that greets, and speaks twice, shifts no answer to another question."""
    said = [("assistant", "hello"), ("user", "one"), ("user", "two"), ("assistant", "2")]
    said += [("assistant", "again"), ("user", "three"), ("assistant", "3"), ("user", "four")]
    messages = tuple({"role": role, "content": text} for role, text in said)
    families = ("greeting", "f2", "comment", "f3")
    found = list(questions([Sample("s", (), messages, families=families)]))
    assert [(q.id, q.messages[-1]["content"], q.answer, q.family) for q in found] == [
        ("s/0", "two", "2", "f2"),
        ("s/1", "three", "3", "f3"),
    ]


def test_predictions_do_not_see_pictures_of_later_turns() -> None:
    """The same two questions: alone with their pictures, or followed by another picture."""
    torch.manual_seed(0)
    model = tiny.model("inject_add", encoder="dinov2")
    processor = tiny.processor(model)
    pictures: list[Picture] = []
    for k in range(2):
        data = io.BytesIO()
        Image.effect_noise((40, 30), 30.0 * k + 1).convert("RGB").save(data, "PNG")
        pictures.append(Picture(f"p{k}", data.getvalue))
    first = ("<image>\nwhat is it?", "a", "sure?", "b")
    short = Sample("s", (pictures[0],), talk(*first))
    long = Sample("s", tuple(pictures), talk(*first, "<image>\nand this?", "c"))
    how = Evaluation(data=Data(path="held out"), max_new_tokens=6)
    answers = [predict(Answerer(model, processor), [sample], how) for sample in (short, long)]
    assert answers[1][:2] == answers[0]
    assert len(answers[1]) == 3


def turned_photo(file: Path) -> None:
    """Upside down, as phones save photos, with a tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.linear_gradient("L").convert("RGB").save(file, exif=exif)


def transparent(file: Path) -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    picture.putalpha(Image.radial_gradient("L"))
    picture.save(file)


def transparent_palette(file: Path) -> None:
    Image.linear_gradient("L").convert("P").save(file, transparency=200)


def of_16_bits(file: Path) -> None:
    levels = np.arange(64 * 64, dtype="u2").reshape(64, 64) * 16
    Image.fromarray(levels).save(file)


def for_print(file: Path) -> None:
    Image.linear_gradient("L").convert("CMYK").save(file)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("turned.jpg", turned_photo),
        ("turned.tif", turned_photo),
        ("turned.png", turned_photo),
        ("transparent.png", transparent),
        ("palette.png", transparent_palette),
        ("palette.gif", transparent_palette),
        ("16.png", of_16_bits),
        ("16.tif", of_16_bits),
        ("print.jpg", for_print),
        ("print.tif", for_print),
    ],
)
def test_a_picture_is_asked_about_as_it_is_trained_on(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    """A file, an opened image and a sample of the test reach the encoder with the same pixels."""
    file = tmp_path / name
    make(file)
    model = tiny.model("single")
    answerer = Answerer(model, tiny.processor(model))
    seen: list[torch.Tensor] = []
    model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    answerer.ask([file], "what?", max_new_tokens=1)
    with Image.open(file) as opened:
        answerer.ask([opened], "what?", max_new_tokens=1)
    sample = Sample("s", (Picture(str(file)),), talk("<image>what?", "a"))
    predict(answerer, [sample], Evaluation(data=Data(path="held out"), max_new_tokens=1))
    batch = Collator(answerer.processor, "chat", 2048, None)([sample])
    assert len(seen) == 3
    for pixels in seen:
        assert torch.equal(pixels, batch["pixel_values"])


@pytest.mark.parametrize("question", ["what?", "what <image> is?", "<image>\nwhat?"])
def test_ask_and_the_test_and_training_give_the_same_prompt(question: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    model = tiny.model("single")
    processor = tiny.processor(model)
    answerer = Answerer(model, processor)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["input_ids"]), with_kwargs=True
    )
    answerer.ask([tmp_path / "a.png"], question, max_new_tokens=1)
    in_front = question if "<image>" in question else f"<image>\n{question}"
    sample = Sample("s", (Picture(str(tmp_path / "a.png")),), talk(in_front, "a"))
    predict(answerer, [sample], Evaluation(data=Data(path="held out"), max_new_tokens=1))
    asked, tested = seen
    assert torch.equal(asked, tested)
    trained = Collator(processor, "chat", 2048, None)([sample])["input_ids"]
    assert torch.equal(trained[:, : asked.shape[1]], asked)


def test_a_marker_without_a_picture_is_left_out() -> None:
    (question,) = questions([Sample("s", (), talk("<image>what?", "a"))])
    assert question.messages[-1]["content"] == "what?"


def test_an_image_that_cannot_be_kept_is_named() -> None:
    model = tiny.model("single")
    answerer = Answerer(model, tiny.processor(model))
    for mode in ("F", "HSV"):
        with pytest.raises(LayerfuseError, match="the given image"):
            answerer.ask([Image.new(mode, (8, 8))], "what?", max_new_tokens=1)


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
