"""Answers that are read while they are written."""

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from PIL import Image

from layerfuse.evaluate.answer import Answerer
from layerfuse.vision.picture import Picture
from tests import tiny
from tests.conversations import processor_of_tokenizer, template_with_end
from tests.test_end_of_answers import ENDS, End

PICTURE = Image.new("RGB", (32, 32), (200, 40, 90))
NAME = "layerfuse-answer"
"""of the thread in which a model answers"""
LEFT_OPEN = """
import atexit, threading, time, torch
from layerfuse.evaluate.streaming import stream_tokens

def count_threads():
    print(threading.active_count(), "thread")

def generate(streamer, stopping):
    streamer.put(torch.tensor([[1]]))
    while not stopping(torch.tensor([[1]]), None).all():
        streamer.put(torch.tensor([2]))
        time.sleep(0.01)
    print("stopped")

# What is registered first is called last.
atexit.register(count_threads)
steps = stream_tokens(generate)
print(next(steps))
"""
"""A program that ends while an answer is half read."""


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def scripted(answerer: Answerer, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model say this and nothing else, whatever it is asked."""
    script = answerer.processor.tokenizer(text)["input_ids"]
    vocabulary = answerer.model.config.get_text_config().vocab_size
    head = answerer.model.get_output_embeddings()
    said = 0

    def next_logits(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal said
        logits = torch.zeros(*hidden.shape[:-1], vocabulary)
        logits[:, -1, script[said % len(script)]] = 1
        said += 1
        return logits

    monkeypatch.setattr(head, "forward", next_logits)


def answerer_with_end(end: End) -> Answerer:
    tokenizer = tiny.tokenizer(end.template)
    if end.added is not None:
        tokenizer.add_tokens([end.added], special_tokens=end.added.special)
    processor = processor_of_tokenizer(tokenizer)
    return Answerer(tiny.model("concat", "clip"), processor)


@pytest.mark.parametrize("strategy", ["concat", "inject_cross", "text_routed"])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_the_last_text_is_what_ask_returns(strategy: str, seed: int) -> None:
    model = tiny.model(strategy, "clip", seed=seed)
    answerer = Answerer(model, tiny.processor(model))

    texts = list(answerer.stream([PICTURE], "what?", 24))

    assert texts[-1] == answerer.ask([PICTURE], "what?", 24)
    assert threads() == []


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("said", ["C# or #1, < 2", "naïve – 猫 ."])
def test_no_text_shows_a_part_of_the_end_of_a_turn(
    end: End, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = answerer_with_end(end)
    scripted(answerer, f"{said}{end.labelled}x and more", monkeypatch)

    texts = list(answerer.stream([PICTURE], "what?", 48))

    scripted(answerer, f"{said}{end.labelled}x and more", monkeypatch)
    assert texts[-1] == said == answerer.ask([PICTURE], "what?", 48)
    for text in texts:
        assert said.startswith(text)
    # nothing is said twice
    assert len(set(texts)) == len(texts)


def test_an_empty_answer_is_one_empty_text(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = answerer_with_end(ENDS[0])
    scripted(answerer, "</s>", monkeypatch)

    assert list(answerer.stream([PICTURE], "what?", 8)) == [""]


def test_an_answer_that_is_cut_off_keeps_what_might_have_been_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answerer = answerer_with_end(End(template_with_end("###"), labelled="###"))
    scripted(answerer, "C##", monkeypatch)

    assert list(answerer.stream([PICTURE], "what?", 3)) == ["C", "C##"]


def test_an_error_of_the_model_comes_to_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = answerer_with_end(ENDS[0])
    steps = 0

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise MemoryError("no room")
        logits = torch.zeros(*hidden.shape[:-1], 320)
        logits[..., 70] = 1
        return logits

    monkeypatch.setattr(answerer.model.get_output_embeddings(), "forward", fail)
    texts: list[str] = []

    with pytest.raises(MemoryError, match="no room"):
        texts.extend(answerer.stream([PICTURE], "what?", 8))

    assert threads() == []


def test_a_reader_who_leaves_stops_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = answerer_with_end(ENDS[0])
    steps = 0

    def count(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        logits = torch.zeros(*hidden.shape[:-1], 320)
        logits[..., 70] = 1
        return logits

    monkeypatch.setattr(answerer.model.get_output_embeddings(), "forward", count)
    stream = answerer.stream([PICTURE], "what?", 400)
    next(stream)
    assert len(threads()) == 1

    stream.close()

    assert threads() == []
    assert steps < 400


def test_a_process_that_ends_stops_the_model_first() -> None:
    command = [sys.executable, "-c", LEFT_OPEN]

    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert ended.returncode == 0
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == ["[2]", "stopped", "1 thread"]


def test_pictures_are_asked_about_as_files_are(tmp_path: Any) -> None:
    model = tiny.model("concat", "clip")
    answerer = Answerer(model, tiny.processor(model))
    file = tmp_path / "picture.png"
    PICTURE.save(file)

    asked = answerer.ask([Picture("shown", file.read_bytes)], "what?", 8)

    assert asked == answerer.ask([file], "what?", 8)


def test_tokens_of_half_a_character_are_not_shown() -> None:
    processor = processor_of_tokenizer(tiny.tokenizer())
    tokens = processor.tokenizer("é")["input_ids"]
    assert len(tokens) == 2

    assert processor.turn_ends.unfinished_text(tokens[:1]) == ""
    assert processor.turn_ends.unfinished_text(tokens) == "é"
