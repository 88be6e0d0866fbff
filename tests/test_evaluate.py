"""Which questions are asked, exact match, and predictions that do not depend on batching."""

import io

import pytest
import torch
from PIL import Image

from layerfuse.data.sample import Sample
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.averages import scores
from layerfuse.evaluate.metrics import exact_match
from layerfuse.evaluate.predict import predict
from layerfuse.evaluate.questions import questions
from layerfuse.evaluate.records import AnswerRecord
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.vision.picture import Picture
from tests import tiny
from tests.made_up import answer_record

A = Picture("a")
B = Picture("b")
C = Picture("c")


@pytest.mark.parametrize(
    ("prediction", "answer", "is_match"),
    [
        ("Red.", "red", True),
        ("  two\nwords ", "two words", True),
        ("3", "3", True),
        # Neither a longer number nor a longer phrase is the answer
        ("13", "3", False),
        ("red circle", "red", False),
        ("", "none", False),
        # An answer of marks alone is no empty answer, and an empty one is never right
        ("", "...", False),
        ("", "", False),
        ("...", "...", True),
        # A full stop belongs to the number behind it, and ends the one before it
        ("5", ".5", False),
        ("5.", "5", True),
        ("'.5'", ".5", True),
        ("10", "-10", False),
        # So does a comma, and a full stop of other writing, before any kind of number
        ("5", ",5", False),
        (".5", ",5", False),
        (",5.", ",5", True),
        ("5", "\uff0e5", False),
        ("\u00bd", ".\u00bd", False),
        ("\u4e94", "\u3002\u4e94", False),
        # Signs and units are compared as they are written
        ("5", "+5", False),
        ("-5", "\u22125", False),
        # Nobody sees a byte order mark, or a space without width
        ("re\ufeffd", "red", True),
        ("\u200b.5", ".5", True),
        ("\ufeff", "\ufeff", False),
        # Composed and decomposed accents look the same
        ("cafe\u0301", "caf\u00e9", True),
        ("red\u3002", "red", True),
        # Full stops of half width, Burmese, Khmer, Armenian and Mongolian
        ("red\uff61", "red", True),
        ("red\u104b", "red", True),
        ("red\u17d4", "red", True),
        ("red\u0589", "red", True),
        ("red\u1803", "red", True),
        ("\u201cred\u201d", "red", True),
        # Marks that mean something
        ("5", "5%", False),
        ("m\u00b2", "m2", False),
    ],
)
def test_exact_match(prediction: str, answer: str, is_match: bool) -> None:
    assert exact_match(prediction, answer) == float(is_match)


def test_scores_average_over_families() -> None:
    """Three colours at 2/3 and one count at 0: the mean is 1/3, not 1/2."""
    records = [
        answer_record("1", sample="a", family="colour", right=True),
        answer_record("2", sample="a", family="colour", right=True),
        answer_record(
            "3",
            sample="b",
            family="colour",
            right=False,
            novel=True,
        ),
        answer_record("4", sample="b", family="count", right=False),
    ]

    averages = scores(records)

    assert averages.mean == pytest.approx(1 / 3)
    assert averages.families == {
        "colour": pytest.approx(2 / 3),
        "count": 0,
    }
    assert averages.categories == {"all": 0.5}
    # Over questions, not over families
    assert averages.by_novelty == {
        "seen": pytest.approx(2 / 3),
        "novel": 0,
    }


def conversation(*contents: str) -> tuple[dict[str, str], ...]:
    """Messages of the user and the assistant in turn."""
    messages = []
    for place, content in enumerate(contents):
        role = ("user", "assistant")[place % 2]
        messages.append({"role": role, "content": content})
    return tuple(messages)


def system(content: str) -> tuple[dict[str, str], ...]:
    """The one message that precedes a conversation."""
    return ({"role": "system", "content": content},)


def test_every_turn_is_asked_on_its_own_with_all_pictures() -> None:
    turns = conversation("<image>first<image>", "1", "second", " 2 ")
    sample = Sample("s", (A, B), system("Be brief.") + turns)

    first, second = questions([sample])

    assert first.id == "s/0"
    assert first.answer == "1"
    assert first.messages[0]["content"] == "Be brief."
    assert first.messages[-1]["content"] == "<image>first<image>"
    assert second.id == "s/1"
    assert second.answer == "2"
    assert second.messages[0]["content"] == "Be brief."
    # Earlier turns are not shown, but their pictures are
    assert second.messages[-1]["content"] == "<image><image>\nsecond"


def test_a_question_sees_no_picture_of_a_later_turn() -> None:
    turns = conversation(
        "no picture?",
        "0",
        "<image>one?",
        "1",
        "and now <image>?",
        "2 <image>",
        "all?",
        "3",
    )

    sample = Sample("s", (A, B, C), turns)

    asked = list(questions([sample]))

    assert [question.id for question in asked] == ["s/0", "s/1", "s/2", "s/3"]
    pictures = [question.sample.pictures for question in asked]
    # The third picture is part of the third answer
    assert pictures == [(), (A,), (A, B), (A, B, C)]
    assert [question.messages[-1]["content"] for question in asked] == [
        "no picture?",
        "<image>one?",
        # Its own picture stays where its words say
        "<image>\nand now <image>?",
        "<image><image><image>\nall?",
    ]


def test_the_pictures_of_a_question_stay_in_their_places() -> None:
    turns = conversation("<image>\nwhat?", "1", "<image>\nIs it like <image> here?", "2")
    sample = Sample("s", (A, B, C), turns)

    _, second = questions([sample])

    assert second.sample.pictures == (A, B, C)
    assert second.messages[-1]["content"] == "<image><image>\nIs it like <image> here?"


def test_a_picture_in_the_systems_words_stays_there() -> None:
    turns = conversation("who?", "1", "<image>?", "2")
    sample = Sample("s", (A, B), system("You know <image>.") + turns)

    first, second = questions([sample])

    assert first.messages[0]["content"] == "You know <image>."
    assert first.messages[-1]["content"] == "who?"
    assert first.sample.pictures == (A,)
    assert second.messages[0]["content"] == "You know <image>."
    assert second.messages[-1]["content"] == "<image>?"
    assert second.sample.pictures == (A, B)


def test_only_a_question_with_an_answer_is_asked() -> None:
    """An assistant that greets, and speaks twice, shifts no answer to another question."""
    messages = (
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
        {"role": "assistant", "content": "again"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "four"},
    )
    # One for each message of the assistant
    families = ("greeting", "f2", "comment", "f3")

    sample = Sample("s", (), messages, families=families)

    first, second = questions([sample])

    assert first.id == "s/0"
    assert first.messages[-1]["content"] == "two"
    assert first.answer == "2"
    assert first.family == "f2"
    assert second.id == "s/1"
    assert second.messages[-1]["content"] == "three"
    assert second.answer == "3"
    assert second.family == "f3"


def test_a_marker_without_a_picture_is_left_out() -> None:
    sample = Sample("s", (), conversation("<image>what?", "a"))

    (question,) = questions([sample])

    assert question.messages[-1]["content"] == "what?"


def test_questions_of_samples_with_one_id_are_told_apart() -> None:
    """Some files give every conversation the name of its picture; answers are paired by id."""
    samples = [
        Sample("a.png", (), conversation("one", "1")),
        Sample("a.png", (), conversation("two", "2")),
    ]

    assert [question.id for question in questions(samples)] == ["a.png/0", "a.png/1"]


@pytest.fixture
def answerer() -> Answerer:
    """A tiny random model that injects pictures into its LLM."""
    torch.manual_seed(0)
    model = tiny.model("inject_add", encoder="dinov2")
    return Answerer(model, tiny.processor(model))


def noise_pictures(count: int) -> list[Picture]:
    """Pictures that differ."""
    pictures = []
    for k in range(count):
        file = io.BytesIO()
        image = Image.effect_noise((40, 30), 30.0 * k + 1)
        image.convert("RGB").save(file, "PNG")
        pictures.append(Picture(f"p{k}", file.getvalue))
    return pictures


def answers_to(
    answerer: Answerer,
    samples: list[Sample],
    *,
    max_new_tokens: int,
    batch_size: int = 1,
) -> list[AnswerRecord]:
    """What the model answers to the samples as an evaluation asks them."""
    evaluation = Evaluation(
        data=Data(path="held out"),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return predict(answerer, samples, evaluation)


def test_predictions_do_not_see_pictures_of_later_turns(answerer: Answerer) -> None:
    """The same two questions: alone with their picture, or followed by another picture."""
    pictures = noise_pictures(2)
    two_turns = ("<image>\nwhat is it?", "a", "sure?", "b")
    third_turn = ("<image>\nand this?", "c")
    short = Sample("s", (pictures[0],), conversation(*two_turns))
    long = Sample("s", tuple(pictures), conversation(*two_turns, *third_turn))

    short_answers = answers_to(answerer, [short], max_new_tokens=6)
    long_answers = answers_to(answerer, [long], max_new_tokens=6)

    assert len(long_answers) == 3
    assert long_answers[:2] == short_answers


@pytest.fixture
def mixed_samples() -> list[Sample]:
    """Three pictures with two questions of other lengths each, and a question without one."""
    turns = conversation("<image>what is it?", "a", "and the other longer question?", "b")
    samples = []
    for place, picture in enumerate(noise_pictures(3)):
        samples.append(Sample(str(place), (picture,), turns))
    samples.append(Sample("text", (), conversation("no picture?", "c")))
    return samples


def test_predictions_do_not_depend_on_the_batch(
    answerer: Answerer, mixed_samples: list[Sample]
) -> None:
    one_by_one = answers_to(answerer, mixed_samples, max_new_tokens=4, batch_size=1)
    # All seven in one batch, padded at the left
    together = answers_to(answerer, mixed_samples, max_new_tokens=4, batch_size=7)

    predictions = [record.prediction for record in one_by_one]
    assert [record.prediction for record in together] == predictions
    ids = ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1", "text/0"]
    assert [record.id for record in one_by_one] == ids
    # The record holds the question without the marker
    assert one_by_one[0].question == "what is it?"


def test_fewer_tokens_give_the_beginning_of_the_same_answer(
    answerer: Answerer, mixed_samples: list[Sample]
) -> None:
    long_answers = answers_to(answerer, mixed_samples, max_new_tokens=4)
    short_answers = answers_to(answerer, mixed_samples, max_new_tokens=1, batch_size=7)

    num_cut = 0
    for long, short in zip(long_answers, short_answers, strict=True):
        assert long.prediction.startswith(short.prediction)
        if long.prediction != short.prediction:
            num_cut += 1
    # Else no answer is longer than one token, and nothing was tested
    assert num_cut > 0
