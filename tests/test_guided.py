"""Guided strategies: what may reach the weights, what does not, and the controls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BertConfig, BertModel

from layerfuse import FusionVLM, Processor
from layerfuse.data.collate import Collator
from layerfuse.data.picture import Picture
from layerfuse.data.sample import Sample, by_turn
from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer, predict, questions, shuffled
from layerfuse.fusion import FUSIONS
from layerfuse.fusion.guided import entropy
from layerfuse.recipe.schema import Data, Evaluation, Stage
from tests import tiny

GUIDED = [name for name in FUSIONS if FUSIONS[name][1].reads != "nothing"]
each_guided = pytest.mark.parametrize("strategy", GUIDED)
WIDTH = 16
HOW = Evaluation(data=Data(path="held out"), batch_size=4, max_new_tokens=2)


@pytest.fixture
def sentence_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny random sentence encoder in a folder."""
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    settings: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2}
    settings["intermediate_size"] = 16
    folder = tmp_path / "sentences"
    BertModel(BertConfig(vocab_size=320, hidden_size=WIDTH, **settings)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "picture.png")
    return Picture(str(tmp_path / "picture.png"))


def build(strategy: str, sentence_encoder: str) -> tuple[FusionVLM, Processor]:
    options: dict[str, Any] = {}
    if FUSIONS[strategy][1].reads == "sentence":
        options = {"sentence_encoder": sentence_encoder, "sentence_width": WIDTH}
    model = tiny.model(strategy, **options)
    return model, tiny.processor(model)


def talk(picture: Picture, *turns: str) -> Sample:
    """A conversation about one picture: question, answer, question, answer, ..."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    messages[0]["content"] = "<image>\n" + messages[0]["content"]
    return Sample("s", (picture,), tuple(messages))


def weights(model: FusionVLM, processor: Processor, *samples: Sample) -> Tensor:
    """The layer weights of a training batch, one row per answer."""
    batch = Collator(processor, "chat", 2048, None)(samples)
    with torch.no_grad():
        return model(**batch).visual.notes["weights"]


@each_guided
def test_no_answer_and_no_later_question_reaches_the_weights(
    strategy: str, sentence_encoder: str, picture: Picture
) -> None:
    model, processor = build(strategy, sentence_encoder)
    first = weights(model, processor, talk(picture, "What colour?", "red", "How many?", "two"))
    assert len(first) == 2  # a row per answer
    other = weights(model, processor, talk(picture, "What colour?", "blue", "How many?", "nine"))
    assert torch.equal(first[0], other[0])
    last = weights(model, processor, talk(picture, "What colour?", "red", "How many?", "nine"))
    assert torch.equal(first, last)
    later = weights(model, processor, talk(picture, "What colour?", "red", "Which shape?", "two"))
    assert torch.equal(first[0], later[0])
    assert not torch.equal(first[1], later[1])  # the question of the turn itself does reach them


@each_guided
@torch.no_grad()
def test_training_and_generation_see_the_same_instruction(
    strategy: str, sentence_encoder: str, picture: Picture
) -> None:
    model, processor = build(strategy, sentence_encoder)
    trained = weights(model, processor, talk(picture, "What colour?", "red"))
    inputs = processor.inputs(
        [[{"role": "user", "content": "<image>\nWhat colour?"}]], [picture.open()]
    )
    prompt = model(**inputs).visual.notes["weights"]
    torch.testing.assert_close(prompt, trained)
    seen: list[Tensor] = []
    model.fusion.register_forward_hook(lambda m, a, out: seen.append(out.notes["weights"]))
    model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert len(seen) == 1  # fused once, from the prompt
    torch.testing.assert_close(seen[0], prompt)
    assert isinstance(Answerer(model, processor).ask([picture.open()], "What colour?"), str)


def test_turns_keep_their_context_and_pictures() -> None:
    one, two = Picture("1"), Picture("2")
    messages = [("user", "<image>a"), ("assistant", "b"), ("user", "<image>c"), ("assistant", "d")]
    sample = Sample(
        "s",
        (one, two),
        tuple({"role": r, "content": c} for r, c in messages),
        families=("x", "y"),
    )
    turns = by_turn(sample)
    assert [t.pictures for t in turns] == [(one,), (one, two)]
    assert [len(t.messages) for t in turns] == [2, 4]
    assert [t.families for t in turns] == [("x",), ("y",)]


@each_guided
def test_rows_by_turn_label_the_same_tokens(
    strategy: str, sentence_encoder: str, picture: Picture
) -> None:
    _, processor = build(strategy, sentence_encoder)
    sample = talk(picture, "What colour?", "red", "How many?", "two", "Where?", "left")
    labels = [
        Collator(processor, "chat", 2048, None, guidance)([sample])["labels"]
        for guidance in ("uniform", "instruction")
    ]
    assert len(labels[1]) == 3
    assert labels[0][labels[0] >= 0].tolist() == labels[1][labels[1] >= 0].tolist()


@each_guided
def test_without_instruction_there_is_one_clear_error(
    strategy: str, sentence_encoder: str, picture: Picture
) -> None:
    model, processor = build(strategy, sentence_encoder)
    pixels = processor.image_processor([picture.open()], return_tensors="pt")["pixel_values"]
    with pytest.raises(LayerfuseError, match=r"got no instruction.*guidance='uniform'"):
        model.get_image_features(pixels)
    visual = model.fuse(model.encode_images(pixels), guidance="uniform")
    weights = visual.notes["weights"]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / weights.shape[1]))


@each_guided
def test_uniform_stages_give_every_parameter_a_gradient(
    strategy: str, sentence_encoder: str, picture: Picture
) -> None:
    """Zero for the allocator: under data parallelism no parameter may be left out."""
    model, processor = build(strategy, sentence_encoder)
    model.train()
    batch = Collator(processor, "plain", 2048, None, "uniform")([talk(picture, "", "red")])
    model(**batch).loss.backward()
    gradients = {n: p.grad for n, p in model.fusion.named_parameters()}
    assert all(g is not None for g in gradients.values())
    moved = {n.split(".")[0] for n, g in gradients.items() if g is not None and g.any()}
    assert "projector" in moved
    assert not moved & {"allocator", "router"}


@pytest.mark.parametrize("regularizer", ["off", "released", "entropy", "balance"])
def test_the_penalty_is_added_in_training_alone(
    regularizer: str, sentence_encoder: str, picture: Picture
) -> None:
    options = {"sentence_encoder": sentence_encoder, "sentence_width": WIDTH}
    model = tiny.model("instruction_weighted", regularizer=regularizer, **options)
    batch = Collator(tiny.processor(model), "chat", 2048, None)(
        [talk(picture, "What colour?", "red", "How many?", "two")]
    )
    plain = model(**batch).loss
    out = model.train()(**batch)
    penalty = model.fusion.penalty(out.visual.fused)
    assert (penalty is None) == (regularizer == "off")
    torch.testing.assert_close(out.loss, plain + (0 if penalty is None else penalty))
    labelled = int((batch["labels"] >= 0).sum())
    whole = model(**batch, num_items_in_batch=2 * labelled).loss  # half of an accumulated batch
    torch.testing.assert_close(whole, out.loss / 2)


def test_stages_without_questions_are_uniform() -> None:
    data = {"path": "x.json"}
    rates = {"fusion": 1.0}
    plain = Stage.model_validate({"data": data, "learning_rates": rates, "prompt": "plain"})
    assert plain.guided_by == "uniform"
    chat = Stage.model_validate({"data": data, "learning_rates": rates})
    assert chat.guided_by == "instruction"
    with pytest.raises(ValueError, match="guidance: instruction needs prompt: chat"):
        Stage.model_validate({**plain.model_dump(), "guidance": "instruction"})


def test_shuffling_gives_every_row_another_instruction() -> None:
    """Other in content: questions repeat."""
    rows = torch.tensor([0.0, 0, 0, 0, 1, 1, 2, 3, 3, 3])[:, None]
    mixed = shuffled(rows)
    assert not (mixed == rows).any()
    assert set(mixed[:, 0].tolist()) <= {0, 1, 2, 3}
    assert torch.equal(mixed, shuffled(rows))
    with pytest.raises(ValueError, match="nothing to shuffle"):
        shuffled(torch.ones(3, 2))


@each_guided
def test_one_question_for_all_leaves_out_the_shuffling(
    strategy: str, sentence_encoder: str, picture: Picture
) -> None:
    model, processor = build(strategy, sentence_encoder)
    samples = [talk(picture, "How many?", "two")] * 3
    rows = predict(Answerer(model, processor), samples, HOW)
    assert all(row.controls.keys() == {"mean"} for row in rows)


@torch.no_grad()
def test_a_named_image_token_is_no_part_of_the_prompt(
    sentence_encoder: str, picture: Picture
) -> None:
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
    sample = talk(picture, "What colour?", "red")
    trained = Collator(processor, "chat", 2048, None)([sample])
    expected = model.prompt_embedding(
        trained["input_ids"], trained["attention_mask"], trained["labels"]
    )
    asked = Answerer(model, processor).instructions(list(questions([sample])))
    assert asked is not None
    torch.testing.assert_close(asked, expected)


@pytest.mark.parametrize("image_rows", [1, 3])
def test_as_many_instructions_as_rows(image_rows: int, picture: Picture) -> None:
    model = tiny.model("text_routed")
    batch = Collator(tiny.processor(model), "chat", 2048, None)(
        [talk(picture, "a", "b"), talk(picture, "c", "d")]
    )
    with pytest.raises(LayerfuseError, match=f"{image_rows} instructions for 2 rows"):
        model(**batch, instruction=torch.zeros(image_rows, 32))


def test_a_collapsed_router_has_a_finite_penalty() -> None:
    logits = torch.tensor([[0.0, 200.0]], requires_grad=True)
    total = entropy(logits.softmax(dim=-1)).sum()
    total.backward()
    assert total.item() == 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@torch.no_grad()
def test_prompt_lookup_is_routed_by_the_prompt(sentence_encoder: str, picture: Picture) -> None:
    """Candidates of assisted decoding are no part of the prompt."""
    model = tiny.model("text_routed")
    inputs = tiny.processor(model).inputs(
        [[{"role": "user", "content": "<image>\nred red red red red"}]], [picture.open()]
    )
    seen: list[Tensor] = []
    model.fusion.register_forward_hook(lambda m, a, out: seen.append(out.notes["weights"]))
    expected = model(**inputs).visual.notes["weights"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert len(seen) >= 2
    for weights in seen:
        torch.testing.assert_close(weights, expected)


@each_guided
def test_controls_take_the_guidance_away(
    strategy: str, sentence_encoder: str, picture: Picture
) -> None:
    model, processor = build(strategy, sentence_encoder)
    samples = [talk(picture, f"Question {k}?", "yes") for k in range(6)]
    used: list[Tensor] = []
    model.fusion.register_forward_hook(lambda m, a, out: used.append(out.notes["weights"]))
    rows = predict(Answerer(model, processor), samples, HOW)
    assert all(row.controls.keys() == {"shuffled", "mean"} for row in rows)
    guided, again, mixed, mean = (
        torch.cat(used[i : i + 2]).detach() for i in range(0, 8, 2)
    )  # two batches each
    torch.testing.assert_close(guided, again)  # asked, then measured
    stored = torch.tensor([row.weights for row in rows])
    torch.testing.assert_close(stored, guided, atol=1e-5, rtol=0)
    assert not torch.allclose(mixed, guided)
    guide = Answerer(model, processor).instructions(list(questions(samples)))
    assert guide is not None
    assert guide.shape[0] == 6
    torch.testing.assert_close(mean, guided.mean(dim=0).expand_as(mean), atol=1e-5, rtol=1e-4)
