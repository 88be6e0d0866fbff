"""Guided strategies: what may reach the weights, what does not, and the controls."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from layerfuse import FusionVLM, Processor
from layerfuse.data.collate import Collator
from layerfuse.data.sample import Sample, by_turn
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate import predict as predict_module
from layerfuse.evaluate.answer import Answerer
from layerfuse.evaluate.likelihood import AnswerLikelihood
from layerfuse.evaluate.predict import predict, shuffled
from layerfuse.evaluate.questions import questions
from layerfuse.fusion import FUSIONS, Fused
from layerfuse.model.instruction import SentenceEncoder
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.evaluate_settings import Evaluation
from layerfuse.recipe.stage import Stage
from layerfuse.vision.picture import Picture
from tests import tiny

GUIDED = [name for name, (_, module) in FUSIONS.items() if module.reads != "nothing"]
SENTENCE_WIDTH = 16
MAX_LENGTH = 2048
EVALUATION = Evaluation(
    data=Data(path="held out"),
    batch_size=4,
    max_new_tokens=2,
)


@pytest.fixture
def sentence_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny random sentence encoder in a folder."""
    # sentences that were embedded before are kept in the home folder
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    config = BertConfig(
        vocab_size=320,
        hidden_size=SENTENCE_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    folder = tmp_path / "sentences"
    BertModel(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    """Grey noise in a file."""
    file = tmp_path / "picture.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(file)
    return Picture(str(file))


@dataclass(frozen=True)
class Guided:
    """A tiny model of a guided strategy, and its processor."""

    model: FusionVLM
    processor: Processor


@pytest.fixture(params=GUIDED)
def guided(request: pytest.FixtureRequest, sentence_encoder: str) -> Guided:
    """Each guided strategy in turn."""
    strategy: str = request.param
    options: dict[str, Any] = {}
    if FUSIONS[strategy][1].reads == "sentence":
        options["sentence_encoder"] = sentence_encoder
        options["sentence_width"] = SENTENCE_WIDTH
    model = tiny.model(strategy, **options)
    return Guided(model, tiny.processor(model))


def conversation(picture: Picture, *turns: str) -> Sample:
    """A conversation about one picture: question, answer, question, answer, ..."""
    messages: list[dict[str, str]] = []
    for index, text in enumerate(turns):
        role = "assistant"
        if index % 2 == 0:
            role = "user"
        messages.append({"role": role, "content": text})
    messages[0]["content"] = "<image>\n" + messages[0]["content"]
    return Sample("s", (picture,), tuple(messages))


def prompt(processor: Processor, picture: Picture, question: str) -> Any:
    """The model's inputs for one question about a picture, which waits for its answer."""
    messages = [{"role": "user", "content": "<image>\n" + question}]
    return processor.inputs([messages], [picture.open()])


def training_batch(processor: Processor, *samples: Sample) -> dict[str, Any]:
    """Samples as they are trained in a stage with prompt `chat`: a row per answer."""
    return Collator(processor, "chat", MAX_LENGTH, store=None)(samples)


@torch.no_grad()
def training_weights(guided: Guided, sample: Sample) -> Tensor:
    """The layer weights in training: (answers, n)."""
    batch = training_batch(guided.processor, sample)
    return guided.model(**batch).visual.notes["weights"]


def record_weights(model: FusionVLM) -> list[Tensor]:
    """A list that gets the weights (B, n) of every later pass through the fusion."""
    recorded: list[Tensor] = []

    def keep_weights(module: nn.Module, inputs: Any, fused: Fused) -> None:
        recorded.append(fused.notes["weights"].detach())

    model.fusion.register_forward_hook(keep_weights)
    return recorded


def test_no_answer_and_no_later_question_reaches_the_weights(
    guided: Guided, picture: Picture
) -> None:
    """Weights that have read the answer would learn what a test does not have."""
    first = training_weights(
        guided,
        conversation(picture, "What colour?", "red", "How many?", "two"),
    )
    other_answers = training_weights(
        guided,
        conversation(picture, "What colour?", "blue", "How many?", "nine"),
    )
    other_last_answer = training_weights(
        guided,
        conversation(picture, "What colour?", "red", "How many?", "nine"),
    )
    other_last_question = training_weights(
        guided,
        conversation(picture, "What colour?", "red", "Which shape?", "two"),
    )

    # a row per answer
    assert len(first) == 2
    # an earlier answer may guide the later turn, but not its own
    assert torch.equal(first[0], other_answers[0])
    assert torch.equal(first, other_last_answer)
    assert torch.equal(first[0], other_last_question[0])
    # the question of the turn itself does reach them
    assert not torch.equal(first[1], other_last_question[1])


@torch.no_grad()
def test_training_and_generation_see_the_same_instruction(guided: Guided, picture: Picture) -> None:
    trained = training_weights(guided, conversation(picture, "What colour?", "red"))
    inputs = prompt(guided.processor, picture, "What colour?")

    in_prompt = guided.model(**inputs).visual.notes["weights"]
    in_generation = record_weights(guided.model)
    # Any: transformers types `generate` for its own classes only
    model: Any = guided.model
    model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)

    torch.testing.assert_close(in_prompt, trained)
    # fused once, from the prompt, although there is no cache
    assert len(in_generation) == 1
    torch.testing.assert_close(in_generation[0], in_prompt)


def test_guided_models_can_be_asked(guided: Guided, picture: Picture) -> None:
    answerer = Answerer(guided.model, guided.processor)
    answer = answerer.ask([picture.open()], "What colour?")
    assert isinstance(answer, str)


def test_turns_keep_their_context_and_pictures() -> None:
    first = Picture("1")
    second = Picture("2")
    sample = Sample(
        "s",
        pictures=(first, second),
        messages=(
            {"role": "user", "content": "<image>a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "<image>c"},
            {"role": "assistant", "content": "d"},
        ),
        families=("x", "y"),
    )

    turns = by_turn(sample)

    assert [turn.pictures for turn in turns] == [(first,), (first, second)]
    assert [len(turn.messages) for turn in turns] == [2, 4]
    assert [turn.families for turn in turns] == [("x",), ("y",)]


def test_rows_by_turn_label_the_same_tokens(guided: Guided, picture: Picture) -> None:
    """A row per answer must not train on more or on less than a row per conversation."""
    sample = conversation(picture, "What colour?", "red", "How many?", "two", "Where?", "left")

    labels: dict[str, Tensor] = {}
    for guidance in ("uniform", "instruction"):
        make_batch = Collator(guided.processor, "chat", MAX_LENGTH, None, guidance)
        labels[guidance] = make_batch([sample])["labels"]

    assert len(labels["instruction"]) == 3
    in_one_row = labels["uniform"][labels["uniform"] >= 0]
    in_three_rows = labels["instruction"][labels["instruction"] >= 0]
    assert in_one_row.tolist() == in_three_rows.tolist()


def test_a_picture_of_several_turns_is_encoded_once(
    guided: Guided, picture: Picture, tmp_path: Path
) -> None:
    """With what it is in every row, however many rows show it, and in their order."""
    file = tmp_path / "another.png"
    Image.effect_noise((40, 40), 70).convert("RGB").save(file)
    two = conversation(picture, "What colour?", "red", "How many?", "two")
    one = conversation(Picture(str(file)), "Which shape?", "round")
    again = conversation(picture, "Where?", "left")
    guided.model.train()

    batch = training_batch(guided.processor, two, one, again)

    assert batch["pixel_values"].shape[0] == 2
    assert batch["image_index"].tolist() == [0, 0, 1, 0]
    in_every_row = dict(batch)
    index = in_every_row.pop("image_index")
    in_every_row["pixel_values"] = batch["pixel_values"][index]
    losses = [guided.model(**inputs).loss for inputs in (batch, in_every_row)]
    torch.testing.assert_close(losses[0], losses[1])


def test_pictures_that_no_rows_share_need_no_index(guided: Guided, picture: Picture) -> None:
    batch = training_batch(guided.processor, conversation(picture, "What colour?", "red"))

    assert "image_index" not in batch


@pytest.fixture
def averaging(sentence_encoder: str) -> Guided:
    """A model whose training is guided by the mean of a conversation's questions."""
    model = tiny.model(
        "instruction_weighted",
        sentence_encoder=sentence_encoder,
        sentence_width=SENTENCE_WIDTH,
        questions="average",
    )
    return Guided(model, tiny.processor(model))


def test_averaged_questions_guide_a_conversation_in_one_row(
    averaging: Guided, sentence_encoder: str, picture: Picture
) -> None:
    """As IGVA's release trains, whose conversations have one embedding each."""
    three = conversation(picture, "What colour?", "red", "How many?", "two", "Where?", "left")
    one = conversation(picture, "Which shape?", "round")

    batch = training_batch(averaging.processor, three, one)

    sentences = SentenceEncoder(sentence_encoder, SENTENCE_WIDTH)
    colour, number, place = sentences(["What colour?", "How many?", "Where?"])
    mean = (colour + number + place) / 3
    (shape,) = sentences(["Which shape?"])
    torch.testing.assert_close(batch["instruction"], torch.stack([mean, shape]))
    # The same answers are learned as without guidance, each once.
    unguided = Collator(averaging.processor, "chat", MAX_LENGTH, None, "uniform")([three, one])
    assert torch.equal(batch["labels"], unguided["labels"])
    weights = averaging.model(**batch).visual.notes["weights"]
    assert len(weights) == 2


def test_averaging_asks_each_question_alone(
    averaging: Guided, sentence_encoder: str, picture: Picture
) -> None:
    """The release does so too: its training and its test differ."""
    sample = conversation(picture, "What colour?", "red", "How many?", "two")
    asked = list(questions([sample]))

    instructions = Answerer(averaging.model, averaging.processor).instructions(asked)

    sentences = SentenceEncoder(sentence_encoder, SENTENCE_WIDTH)
    expected = sentences(["What colour?", "How many?"])
    torch.testing.assert_close(instructions, expected)


def test_without_instruction_there_is_one_clear_error(guided: Guided, picture: Picture) -> None:
    """Serving engines call `get_image_features` with pixels alone."""
    images = [picture.open()]
    pixels = guided.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    with pytest.raises(LayerfuseError, match=r"got no instruction.*guidance='uniform'"):
        guided.model.get_image_features(pixels)

    # and what the error recommends works
    features = guided.model.encode_images(pixels)
    weights = guided.model.fuse(features, guidance="uniform").notes["weights"]
    uniform = torch.full_like(weights, 1 / weights.shape[1])
    torch.testing.assert_close(weights, uniform)


def test_uniform_stages_give_every_parameter_a_gradient(guided: Guided, picture: Picture) -> None:
    """Zero for the allocator: under data parallelism no parameter may be left out."""
    make_batch = Collator(guided.processor, "plain", MAX_LENGTH, None, "uniform")
    batch = make_batch([conversation(picture, "", "red")])

    guided.model.train()
    guided.model(**batch).loss.backward()

    parts_that_move: set[str] = set()
    for name, parameter in guided.model.fusion.named_parameters():
        assert parameter.grad is not None, name
        if parameter.grad.any():
            parts_that_move.add(name.split(".")[0])
    assert "projector" in parts_that_move
    assert not parts_that_move & {"allocator", "router"}


@pytest.mark.parametrize("regularizer", ["off", "released", "entropy", "balance"])
def test_the_penalty_is_added_in_training_alone(
    regularizer: str, sentence_encoder: str, picture: Picture
) -> None:
    model = tiny.model(
        "instruction_weighted",
        regularizer=regularizer,
        sentence_encoder=sentence_encoder,
        sentence_width=SENTENCE_WIDTH,
    )
    sample = conversation(picture, "What colour?", "red", "How many?", "two")
    batch = training_batch(tiny.processor(model), sample)

    in_evaluation = model(**batch).loss
    model.train()
    output = model(**batch)

    penalty = model.fusion.penalty(output.visual.fused)
    if regularizer == "off":
        assert penalty is None
        torch.testing.assert_close(output.loss, in_evaluation)
    else:
        assert penalty is not None
        torch.testing.assert_close(output.loss, in_evaluation + penalty)

    # half of an accumulated batch counts half, its penalty too
    labelled = int((batch["labels"] >= 0).sum())
    of_half = model(**batch, num_items_in_batch=2 * labelled).loss
    torch.testing.assert_close(of_half, output.loss / 2)


def test_stages_without_questions_are_uniform() -> None:
    settings: dict[str, Any] = {
        "data": {"path": "x.json"},
        "learning_rates": {"fusion": 1.0},
    }

    plain = Stage.model_validate({**settings, "prompt": "plain"})
    chat = Stage.model_validate(settings)

    assert plain.guided_by == "uniform"
    assert chat.guided_by == "instruction"
    with pytest.raises(ValueError, match="guidance: instruction needs prompt: chat"):
        Stage.model_validate({**plain.model_dump(), "guidance": "instruction"})


@torch.no_grad()
def test_a_named_image_token_is_no_part_of_the_prompt(picture: Picture) -> None:
    """Training, generation and the test read the same prompt under any image token."""
    model = tiny.model("text_routed")
    processor = Processor(
        tiny.image_processor(),
        tiny.tokenizer(image=False),
        patch_size=tiny.PATCH,
        fusion=model.config.fusion,
        layers=4,
        image_token="<other>",
    )
    sample = conversation(picture, "What colour?", "red")

    batch = training_batch(processor, sample)
    in_training = model.prompt_embedding(
        batch["input_ids"],
        batch["attention_mask"],
        batch["labels"],
    )
    in_test = Answerer(model, processor).instructions(list(questions([sample])))

    assert in_test is not None
    torch.testing.assert_close(in_test, in_training)


@pytest.mark.parametrize("num_instructions", [1, 3])
def test_as_many_instructions_as_rows(num_instructions: int, picture: Picture) -> None:
    """One instruction would be broadcast to all rows without an error."""
    model = tiny.model("text_routed")
    batch = training_batch(
        tiny.processor(model),
        conversation(picture, "a", "b"),
        conversation(picture, "c", "d"),
    )

    instruction = torch.zeros(num_instructions, 32)
    with pytest.raises(LayerfuseError, match=f"{num_instructions} instructions for 2 rows"):
        model(**batch, instruction=instruction)


@torch.no_grad()
def test_prompt_lookup_is_routed_by_the_prompt(picture: Picture) -> None:
    """Candidates of assisted decoding are no part of the prompt."""
    # Any: transformers types `generate` for its own classes only
    model: Any = tiny.model("text_routed")
    # words that repeat, so that a continuation is found in the prompt
    inputs = prompt(tiny.processor(model), picture, "red red red red red")
    expected = model(**inputs).visual.notes["weights"]

    recorded = record_weights(model)
    model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        prompt_lookup_num_tokens=3,
    )

    assert len(recorded) >= 1
    for weights in recorded:
        torch.testing.assert_close(weights, expected)


def test_shuffling_gives_every_row_another_instruction() -> None:
    """Other in content: questions repeat."""
    instructions = torch.tensor([0.0, 0, 0, 0, 1, 1, 2, 3, 3, 3]).unsqueeze(-1)

    mixed = shuffled(instructions)

    assert not (mixed == instructions).any()
    assert set(mixed.flatten().tolist()) <= {0, 1, 2, 3}
    # the same draws every time
    assert torch.equal(mixed, shuffled(instructions))
    with pytest.raises(ValueError, match="nothing to shuffle"):
        shuffled(torch.ones(3, 2))


def test_one_question_for_all_leaves_out_the_shuffling(guided: Guided, picture: Picture) -> None:
    samples = [conversation(picture, "How many?", "two")] * 3
    answerer = Answerer(guided.model, guided.processor)

    for record in predict(answerer, samples, EVALUATION):
        assert record.controls.keys() == {"mean"}


def test_controls_take_the_guidance_away(guided: Guided, picture: Picture) -> None:
    """What weighs the layers while the answers under each control are generated."""
    samples: list[Sample] = []
    for index in range(6):
        samples.append(conversation(picture, f"Question {index}?", "yes"))
    answerer = Answerer(guided.model, guided.processor)

    of_batches = record_weights(guided.model)
    records = predict(answerer, samples, EVALUATION)

    # six questions are two batches; their right answers are read, then they are asked and measured;
    # both once more under each control
    assert len(of_batches) == 14
    answered = torch.cat(of_batches[0:2])
    asked = torch.cat(of_batches[2:4])
    measured = torch.cat(of_batches[4:6])
    read_under_shuffled = torch.cat(of_batches[6:8])
    under_shuffled = torch.cat(of_batches[8:10])
    read_under_mean = torch.cat(of_batches[10:12])
    under_mean = torch.cat(of_batches[12:14])
    torch.testing.assert_close(read_under_shuffled, under_shuffled)
    torch.testing.assert_close(read_under_mean, under_mean)
    torch.testing.assert_close(measured, asked)
    torch.testing.assert_close(answered, asked)
    assert not torch.allclose(under_shuffled, asked)
    mean = asked.mean(dim=0).expand_as(under_mean)
    torch.testing.assert_close(under_mean, mean, atol=1e-5, rtol=1e-4)

    # what the records say of them, rounded to five digits
    for record in records:
        assert record.controls.keys() == {"shuffled", "mean"}
    stored = torch.tensor([record.weights for record in records])
    torch.testing.assert_close(stored, asked, atol=1e-5, rtol=0)


def test_controls_are_read_as_guided_answers_are(
    guided: Guided, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a second try is right more often: an answer that is right when it is forced
    counts for both, or a control would lose by that alone."""
    samples: list[Sample] = []
    for index in range(4):
        samples.append(conversation(picture, f"Question {index}?", "yes"))
    measure = predict_module.answer_likelihoods

    def forced_right(*arguments: Any, **options: Any) -> list[AnswerLikelihood]:
        return [replace(each, greedy=True, tokens=1) for each in measure(*arguments, **options)]

    monkeypatch.setattr(predict_module, "answer_likelihoods", forced_right)
    answerer = Answerer(guided.model, guided.processor)

    for record in predict(answerer, samples, EVALUATION):
        assert record.score == 1
        assert [control.score for control in record.controls.values()] == [1, 1]


def test_every_question_has_an_instruction(guided: Guided, picture: Picture) -> None:
    samples: list[Sample] = []
    for index in range(6):
        samples.append(conversation(picture, f"Question {index}?", "yes"))

    answerer = Answerer(guided.model, guided.processor)
    instructions = answerer.instructions(list(questions(samples)))

    assert instructions is not None
    assert len(instructions) == 6
