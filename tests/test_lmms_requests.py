"""What the plug-in of lmms-eval does without lmms-eval: options, questions, scores, errors."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.lmms_requests import (
    MAX_NEW_TOKENS,
    AnswerLimits,
    answer_limits,
    asked_in_messages,
    asked_of_text,
)
from layerfuse.evaluate.lmms_tasks.ocrvqa import ocrvqa
from layerfuse.evaluate.lmms_tasks.tallyqa import tallyqa
from layerfuse.evaluate.lmms_tasks.vsr import vsr
from layerfuse.model.chat_template import LITERAL_IMAGE
from layerfuse_cli.app import app

RED = Image.new("RGB", (4, 3), "red")


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, AnswerLimits(MAX_NEW_TOKENS, ())),
        ({"max_new_tokens": 16, "until": None}, AnswerLimits(16, ())),
        ({"until": "\n\n", "do_sample": False}, AnswerLimits(MAX_NEW_TOKENS, ("\n\n",))),
        ({"until": ["Q:", ""], "temperature": 0.0}, AnswerLimits(MAX_NEW_TOKENS, ("Q:",))),
        # Greedy in the words of lmms-eval's tasks.
        (
            {"temperature": 0, "top_p": 1.0, "num_beams": 1, "image_aspect_ratio": "original"},
            AnswerLimits(MAX_NEW_TOKENS, ()),
        ),
        ({"do_sample": False, "temperature": 0.7}, AnswerLimits(MAX_NEW_TOKENS, ())),
        ({"do_sample": True, "temperature": 0}, AnswerLimits(MAX_NEW_TOKENS, ())),
        ({"do_sample": True, "top_k": 1}, AnswerLimits(MAX_NEW_TOKENS, ())),
    ],
)
def test_greedy_options_are_followed(options: dict[str, Any], limits: AnswerLimits) -> None:
    assert answer_limits(options) == limits


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"do_sample": True}, "answers greedily"),
        ({"temperature": 0.2}, "answers greedily"),
        ({"do_sample": True, "temperature": 1}, "answers greedily"),
        ({"num_beams": 3}, "num_beams=3"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop_sequences": ["\n"]}, "stop_sequences"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(LayerfuseError, match=reason):
        answer_limits(options)


@pytest.mark.parametrize(
    ("text", "pictures", "content"),
    [
        ("Why?", 0, "Why?"),
        ("Why?", 2, "<image><image>\nWhy?"),
        ("Is <image> like <image>?", 2, "Is <image> like <image>?"),
        ("And <image>?", 2, "<image>\nAnd <image>?"),
        # No picture can belong to it.
        ("What is <image>?", 0, f"What is {LITERAL_IMAGE}?"),
    ],
)
def test_pictures_stand_where_the_text_says(text: str, pictures: int, content: str) -> None:
    question = asked_of_text(text, [RED] * pictures, "task/test/0")

    assert question.messages == ({"role": "user", "content": content},)
    assert len(question.sample.pictures) == pictures
    for picture in question.sample.pictures:
        assert picture.open().tobytes() == RED.tobytes()


def test_messages_keep_their_roles_and_the_places_of_pictures() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "image", "url": RED}, {"type": "text", "text": "1?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And <image> "},
                {"type": "image", "url": RED},
                {"type": "text", "text": "?"},
            ],
        },
    ]

    question = asked_in_messages(messages, "task/test/0")

    assert [message["role"] for message in question.messages] == [
        *("system", "user"),
        *("assistant", "user"),
    ]
    assert [message["content"] for message in question.messages] == [
        "Be brief.",
        "<image>\n1?",
        "Red.",
        f"And {LITERAL_IMAGE} <image>?",
    ]
    assert len(question.sample.pictures) == 2


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no list of messages"),
        ([{"role": "tool", "content": "1"}], "no role"),
        ([{"role": "assistant", "content": "1"}], "no question"),
        (
            [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}],
            "cannot read the part",
        ),
        ([{"role": "user", "content": [{"type": "image", "url": 7}]}], "no picture"),
    ],
)
def test_messages_that_cannot_be_asked_are_refused(messages: Any, reason: str) -> None:
    with pytest.raises(LayerfuseError, match=reason):
        asked_in_messages(messages, "task/test/0")


def test_videos_and_sounds_are_refused(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(b"\0" * 64)
    question = asked_of_text("Why?", [str(video)], "task/test/0")

    with pytest.raises(LayerfuseError, match="no picture"):
        asked_of_text("Why?", [{"array": [0.0]}], "task/test/0")
    # As a picture that it is not.
    with pytest.raises(LayerfuseError, match="cannot read the image"):
        question.sample.pictures[0].open()


def test_scores_of_own_tasks() -> None:
    title = {"answer": "A Title", "group": "Travel"}
    assert ocrvqa.score(title, ["a title."]) == {"accuracy": 1.0}
    assert ocrvqa.score(title, ["a title of a book"]) == {"accuracy": 0.0}

    three = {"answer": "3", "group": "complex"}
    assert tallyqa.score(three, ["Three."]) == {"accuracy": 1.0, "accuracy_complex": 1.0}
    assert tallyqa.score(three, ["33"]) == {"accuracy": 0.0, "accuracy_complex": 0.0}

    true = {"answer": "yes", "group": "under"}
    assert vsr.score(true, ["Yes, it is."]) == {"accuracy": 1.0}
    assert vsr.score(true, ["No."]) == {"accuracy": 0.0}


def test_one_thing_is_asked(tmp_path: Path) -> None:
    both = CliRunner().invoke(app, ["eval", str(tmp_path), "--lmms", "mme", "--suite", "real"])
    none = CliRunner().invoke(app, ["eval", str(tmp_path)])
    useless = CliRunner().invoke(app, ["eval", str(tmp_path), "--lmms", "mme", "--controls"])

    assert both.exit_code == none.exit_code == useless.exit_code == 2
    assert "one of them" in both.output
    assert "one of them" in none.output
    assert "--controls goes with --data alone" in useless.output


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_it_is_said_how_to_install_it(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["eval", str(tmp_path), "--lmms", "mme"])

    assert ended.exit_code == 2
    assert "make test-lmms" in ended.output
