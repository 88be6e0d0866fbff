"""How likely right answers are to a model: one number for each question of the test."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from layerfuse.data.sample import Sample
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.likelihood import answer_likelihoods
from layerfuse.evaluate.predict import predict
from layerfuse.evaluate.questions import Question, questions
from layerfuse.evaluate.records import AnswerRecord
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.vision.picture import Picture
from tests import tiny

TEST = Evaluation(data=Data(path="held out"), max_new_tokens=2, batch_size=2)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Questions and answers of unlike lengths: about one picture, about two, and about none."""
    pictures: list[Picture] = []
    for number in range(3):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 30), (80 * number, 10, 90)).save(file)
        pictures.append(Picture(str(file)))
    about_one = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image> Which colour?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "And how many things are there?"},
        {"role": "assistant", "content": "seventeen"},
    )
    about_two = (
        {"role": "user", "content": "<image><image> Same?"},
        {"role": "assistant", "content": "no"},
    )
    about_none = (
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    )
    return [
        Sample("one", (pictures[0],), about_one),
        Sample("two", (pictures[1], pictures[2]), about_two),
        Sample("none", (), about_none),
    ]


def answerer_of(strategy: str, seed: int = 0) -> Answerer:
    """A tiny random model, whose instruction matters where one guides."""
    model = tiny.model(strategy, seed=seed)
    if strategy == "text_routed":
        with torch.no_grad():
            # else nearly uniform weights, as every router has them at first
            for parameter in model.fusion.router.parameters():
                parameter.mul_(10)
    return Answerer(model, tiny.processor(model))


@torch.no_grad()
def naive_log_likelihood(answerer: Answerer, question: Question) -> float:
    """Token by token behind the very prompt of the test: one row, no padding, no labels."""
    processor = answerer.processor
    inputs: dict[str, Any] = {}
    if question.sample.pictures:
        images = [picture.open() for picture in question.sample.pictures]
        inputs = dict(processor.image_processor(images, return_tensors="pt"))
    text = processor.text_inputs([question.messages], processor.num_image_tokens(32, 32))
    prompt = text["input_ids"][0].tolist()
    if question.sample.pictures and processor.instruction.guided:
        # what guides is the question alone, without the answer
        inputs["instruction"] = answerer.model.prompt_embedding(torch.tensor([prompt]))
    end = [processor.tokenizer.eos_token_id]
    answer = processor.tokenizer(question.answer, add_special_tokens=False)["input_ids"] + end

    log_probabilities: list[float] = []
    for place, token in enumerate(answer):
        so_far = torch.tensor([prompt + answer[:place]])
        logits = answerer.model(input_ids=so_far, **inputs).logits[0, -1]
        log_probabilities.append(float(logits.log_softmax(dim=-1)[token]))
    return sum(log_probabilities) / len(log_probabilities)


@pytest.mark.parametrize("strategy", ["concat", "inject_cross", "text_routed"])
def test_it_is_the_mean_over_the_tokens_of_the_right_answer(
    strategy: str, samples: list[Sample]
) -> None:
    """Against one token at a time; in batches, questions of other lengths do not matter."""
    answerer = answerer_of(strategy)

    records = predict(answerer, samples, TEST)

    for question, record in zip(questions(samples), records, strict=True):
        expected = naive_log_likelihood(answerer, question)
        assert record.log_likelihood == pytest.approx(expected, abs=3e-5), question.id


def test_another_guidance_gives_another_likelihood(samples: list[Sample]) -> None:
    answerer = answerer_of("text_routed")
    about_pictures = list(questions(samples))[:3]

    guided = answer_likelihoods(answerer, about_pictures, batch_size=3)
    unguided = answer_likelihoods(answerer, about_pictures, batch_size=3, guidance="uniform")

    for with_it, without in zip(guided, unguided, strict=True):
        assert with_it.tokens == without.tokens
        assert with_it.total != pytest.approx(without.total, abs=1e-3)


def terse(strategy: str, seed: int) -> Answerer:
    """A tiny random model that says a and b, and ends where it would say c."""
    answerer = answerer_of(strategy, seed)
    tokenizer = answerer.processor.tokenizer
    a, b, c = tokenizer("abc", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    head = answerer.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[end] = 1.1 * head.weight[c]
    answerer.model.close_answers({a, b, c, end})
    return answerer


def answered_as(samples: list[Sample], answers: list[str]) -> list[Sample]:
    """The samples with other right answers, in the order of the questions."""
    left = iter(answers)
    changed = []
    for sample in samples:
        messages = []
        for message in sample.messages:
            if message["role"] == "assistant":
                message = {"role": "assistant", "content": next(left)}
            messages.append(message)
        changed.append(replace(sample, messages=tuple(messages)))
    return changed


@pytest.mark.parametrize("strategy", ["concat", "inject_cross", "text_routed"])
def test_answers_that_are_known_from_it_are_those_that_generation_gives(
    strategy: str, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_asked: list[int] = []
    alone = TEST.model_copy(update={"log_likelihood": False, "controls": (), "max_new_tokens": 8})
    for seed in range(5):
        answerer = terse(strategy, seed)
        # the right answers are what it says
        said = [record.prediction for record in predict(answerer, samples, alone)]
        changed = answered_as(samples, [text or "a" for text in said])
        generate = answerer.answer

        def counted(asked: list[Question], generate: Any = generate, **options: Any) -> list[str]:
            num_asked.append(len(asked))
            return generate(asked, **options)

        # with 1 token at most, longer answers are cut off as ever
        for max_new_tokens in (8, 1):
            update = {"max_new_tokens": max_new_tokens}
            without = predict(answerer, changed, alone.model_copy(update=update))
            monkeypatch.setattr(answerer, "answer", counted)
            update = {**update, "log_likelihood": True}
            with_it = predict(answerer, changed, alone.model_copy(update=update))
            monkeypatch.setattr(answerer, "answer", generate)
            expected = [record.prediction for record in without]
            assert [record.prediction for record in with_it] == expected
    # 4 questions, 5 models, 2 lengths
    assert 0 < sum(num_asked) < 40


def test_an_answer_behind_another_prompt_than_generation_starts_from_is_not_known(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may merge the end of a prompt with the answer: generation then sees another."""
    alone = TEST.model_copy(update={"log_likelihood": False, "controls": (), "max_new_tokens": 8})
    num_known = 0
    for seed in range(5):
        answerer = terse("concat", seed)
        said = [record.prediction for record in predict(answerer, samples, alone)]
        asked = list(questions(answered_as(samples, [text or "a" for text in said])))
        num_known += sum(row.greedy for row in answer_likelihoods(answerer, asked, batch_size=4))
        whole_inputs = answerer.processor.text_inputs

        def without_last_token(*args: Any, whole: Any = whole_inputs) -> dict[str, torch.Tensor]:
            return {name: value[:, :-1] for name, value in whole(*args).items()}

        monkeypatch.setattr(answerer.processor, "text_inputs", without_last_token)
        for row in answer_likelihoods(answerer, asked, batch_size=4):
            assert not row.greedy
    assert num_known > 0


def test_it_can_be_left_out(samples: list[Sample]) -> None:
    answerer = answerer_of("concat")
    evaluation = TEST.model_copy(update={"log_likelihood": False})

    records = predict(answerer, samples, evaluation)

    assert [record.log_likelihood for record in records] == [None] * 4
    assert "log_likelihood" not in records[0].to_json()


def test_records_keep_it_and_older_ones_lack_it(samples: list[Sample]) -> None:
    (record, *_) = predict(answerer_of("concat"), samples[:1], TEST)

    line = record.to_json()
    assert AnswerRecord.from_json(line) == record
    del line["log_likelihood"]
    assert AnswerRecord.from_json(line).log_likelihood is None


def test_the_progress_counts_it_as_one_more_pass(samples: list[Sample]) -> None:
    seen: list[tuple[int, int]] = []

    def watch(phase: str, done: int, total: int, note: str = "") -> None:
        if phase == "evaluate":
            seen.append((done, total))

    predict(answerer_of("text_routed"), samples, TEST, watch)

    counts = [done for done, _ in seen]
    assert counts == sorted(counts)
    # four questions: answered and measured, as they are and under two controls
    assert seen[-1] == (24, 24)


@pytest.mark.parametrize("log_likelihood", [True, False])
def test_a_model_that_computes_no_numbers_is_refused(
    samples: list[Sample], log_likelihood: bool
) -> None:
    """Its answers would be empty, and be scored: POPE gives such a model 67 points."""
    answerer = answerer_of("concat")
    with torch.no_grad():
        answerer.model.fusion.get_parameter("projector.linear_2.weight")[0, 0] = torch.nan
    evaluation = TEST.model_copy(update={"log_likelihood": log_likelihood})

    with pytest.raises(LayerfuseError, match="logits are not numbers"):
        predict(answerer, samples, evaluation)
