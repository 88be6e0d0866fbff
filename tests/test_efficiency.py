"""No wasted arithmetic: what is frozen has no graph, what nobody reads does not run, batches hold
little padding; and what augments or fills a batch is the same however the training was cut."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from layerfuse.data.collate import Collator, LengthGroups, SampleDataset
from layerfuse.data.sample import Sample
from layerfuse.fusion import FUSIONS
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import MASKS_POSITIONS, FusionVLM
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.stage import Stage
from layerfuse.train.stages import begin_stage
from layerfuse.vision.picture import Picture
from tests import tiny

QUESTION = {"role": "user", "content": "n?"}
QUESTION_WITH_PICTURE = {"role": "user", "content": "<image> n?"}
ANSWER = {"role": "assistant", "content": "one"}
TEXT_SAMPLE = Sample("t", (), (QUESTION, ANSWER))


def train_stage(parts: list[str]) -> Stage:
    """A stage that trains these parts of the model."""
    return Stage.model_validate(
        {
            "data": Data(path="unused.json"),
            "learning_rates": dict.fromkeys(parts, 1e-3),
        }
    )


def processor(**options: Any) -> Processor:
    """A processor of the tiny models' pictures and text."""
    return Processor(
        tiny.image_processor(),
        tiny.tokenizer(),
        patch_size=tiny.PATCH,
        **options,
    )


def collator(
    reader: Processor,
    max_length: int = 512,
    blank: bool = False,
) -> Collator:
    """Batches of conversations with pixels."""
    return Collator(reader, "chat", max_length, None, blank=blank)


def picture_sample(folder: Path, name: str = "a") -> Sample:
    """A conversation about a picture of noise, which is written to the folder."""
    file = folder / f"{name}.png"
    # Noise, so that every crop of it is another picture
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    image.save(file)
    return Sample(
        name,
        pictures=(Picture(str(file)),),
        messages=(QUESTION_WITH_PICTURE, ANSWER),
    )


def test_with_only_the_fusion_in_training_nothing_else_has_a_gradient(tmp_path: Path) -> None:
    """Neither the LLM's embeddings nor its weights nor the encoder are part of the graph."""
    model = tiny.model("concat").train()
    begin_stage(model, train_stage(["fusion"]), torch.float32)
    outputs: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    model.vision_tower.register_forward_hook(
        lambda module, args, output: outputs.extend(output.patches)
    )

    batch = collator(processor())([picture_sample(tmp_path)])
    model(**batch).loss.backward()

    assert len(outputs) == 1 + len(model.vision_tower.layers)
    for output in outputs:
        assert not output.requires_grad
    # The first part of a parameter's name is that of the module it belongs to
    parts_with_gradient = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts_with_gradient.add(name.split(".")[0])
    assert parts_with_gradient == {"fusion"}


@pytest.mark.parametrize("strategy", list(FUSIONS))
def test_blocks_above_the_deepest_layer_do_not_exist(strategy: str) -> None:
    model = tiny.model(strategy)

    encoder = model.vision_tower
    blocks = encoder.family.blocks(encoder.tower)
    assert len(blocks) == max(encoder.layers) <= 4


def test_logits_exist_at_labelled_positions_only(tmp_path: Path) -> None:
    """The head over a large vocabulary is much of the work, and most positions have no label."""
    model = tiny.model("concat").train()
    rows_of_logits: list[int] = []

    def note_rows(module: torch.nn.Module, args: Any, logits: Tensor) -> None:
        # (positions, vocabulary), or (rows, positions, vocabulary)
        rows_of_logits.append(logits.shape[:-1].numel())

    model.get_output_embeddings().register_forward_hook(note_rows)

    batch = collator(processor())([picture_sample(tmp_path), TEXT_SAMPLE])
    model(**batch)

    # Each position predicts the next one; -100 says that a token is not learned
    labelled = batch["labels"][:, 1:] != -100
    positions = int(labelled.sum())
    if not MASKS_POSITIONS:
        # Older versions of transformers take the same positions of all rows.
        positions = len(labelled) * int(labelled.any(dim=0).sum())
    assert rows_of_logits == [positions]


@pytest.mark.parametrize(
    "parts",
    [
        ["fusion"],
        ["vision"],
        ["fusion", "llm", "vision"],
    ],
)
def test_text_alone_runs_no_encoder_and_trains_all_parts_with_zero(parts: list[str]) -> None:
    """The same gradients on every process, so that none waits for another."""
    model = tiny.model("concat").train()
    begin_stage(model, train_stage(parts), torch.float32)
    model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the encoder ran"))

    batch = collator(processor())([TEXT_SAMPLE])
    model(**batch).loss.backward()

    modules = {
        "fusion": model.fusion,
        "vision": model.vision_tower,
        "llm": model.language_model,
    }
    for part in parts:
        is_moved = False
        for parameter in modules[part].parameters():
            assert parameter.grad is not None, part
            is_moved = is_moved or bool(parameter.grad.any())
        # Without a picture only the LLM learns something
        assert is_moved == (part == "llm")


def loss_and_gradients(
    model: FusionVLM,
    batch: dict[str, Any],
) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch, and by name the gradient of each parameter that has one."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.clone()
    return loss.item(), gradients


# This one needs a pretrained sentence encoder.
RANDOM_WEIGHTS_SUFFICE = [name for name in FUSIONS if name != "instruction_weighted"]


@pytest.mark.parametrize("strategy", RANDOM_WEIGHTS_SUFFICE)
def test_a_blank_picture_changes_neither_loss_nor_gradients(strategy: str) -> None:
    model = tiny.model(strategy).train()
    reader = processor(
        fusion=model.config.fusion,
        layers=len(model.config.vision_layers),
    )

    plain_batch = collator(reader, blank=False)([TEXT_SAMPLE])
    blank_batch = collator(reader, blank=True)([TEXT_SAMPLE])
    assert "pixel_values" not in plain_batch
    assert "pixel_values" in blank_batch

    plain_loss, plain_gradients = loss_and_gradients(model, plain_batch)
    blank_loss, blank_gradients = loss_and_gradients(model, blank_batch)
    assert blank_loss == pytest.approx(plain_loss, abs=1e-5)
    for name, gradient in blank_gradients.items():
        # A part that text alone does not reach has no gradient then, with a blank one of zero
        expected = plain_gradients.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def lengths() -> Tensor:
    """Lengths of 1000 samples."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, 2000, (1000,), generator=generator)


def test_an_epoch_holds_every_sample_in_whole_batches(lengths: Tensor) -> None:
    groups = LengthGroups(lengths, 16, seed=3)

    order = list(groups)

    assert len(groups) == 63 * 16
    assert len(order) == 63 * 16
    # Eight come twice, to fill the last batch
    assert sorted(set(order)) == list(range(1000))


def test_fewer_samples_than_a_batch_come_several_times(lengths: Tensor) -> None:
    counts = Counter(LengthGroups(lengths[:5], 16, seed=3))

    assert sorted(counts) == list(range(5))
    assert set(counts.values()) == {3, 4}


def test_the_order_depends_on_seed_and_epoch_alone(lengths: Tensor) -> None:
    groups = LengthGroups(lengths, 16, seed=3)
    order = list(groups)

    assert list(groups) == order
    groups.set_epoch(1)
    assert list(groups) != order


def padding(batches: Tensor) -> float:
    """The share of padding, given the lengths of the samples of each batch (batches, samples)."""
    # A batch is as wide as its longest sample
    widths = batches.amax(dim=1)
    used = batches.mean(dim=1)
    share_used = used.sum() / widths.sum()
    return float(1 - share_used)


def test_batches_hold_samples_of_similar_length_in_random_order(lengths: Tensor) -> None:
    sampler_order = list(LengthGroups(lengths, 16, seed=3))
    plain_order = [*range(1000), *range(8)]

    sampler_batches = lengths[sampler_order].view(-1, 16).float()
    plain_batches = lengths[plain_order].view(-1, 16).float()

    assert padding(sampler_batches) < padding(plain_batches) / 10
    # Not from short to long: a model would see one kind of sample for a long time
    means = sampler_batches.mean(dim=1)
    places = torch.arange(63.0)
    correlations = torch.corrcoef(torch.stack([means, places]))
    assert abs(float(correlations[0, 1])) < 0.3


def crops(
    samples: list[Sample],
    seed: int,
    epoch: int,
) -> list[Any]:
    """The boxes to which the first pictures of two samples are cropped, the second's first."""
    dataset = SampleDataset(samples, crop=0.5, seed=seed)
    dataset.set_epoch(epoch)
    # The order of reading must not matter
    second = dataset[1].pictures[0]
    first = dataset[0].pictures[0]
    return [second.crop, first.crop]


def test_random_crops_depend_on_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    samples = [picture_sample(tmp_path, name) for name in ("a", "b")]

    assert crops(samples, 0, 0) == crops(samples, 0, 0)
    different = set()
    for seed in range(3):
        for epoch in range(3):
            different.add(str(crops(samples, seed, epoch)))
    assert len(different) == 9


def test_random_crops_keep_at_least_their_share_of_each_side(tmp_path: Path) -> None:
    samples = [picture_sample(tmp_path, name) for name in ("a", "b")]

    for seed in range(50):
        for left, top, right, bottom in crops(samples, seed, 0):
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
            assert right - left >= 0.5
            assert bottom - top >= 0.5


def test_a_cropped_picture_keeps_its_size(tmp_path: Path) -> None:
    samples = [picture_sample(tmp_path)]

    plain_sample = SampleDataset(samples, crop=None)[0]
    cropped_sample = SampleDataset(samples, crop=0.5)[0]

    # Another size would be another number of image tokens
    whole = plain_sample.pictures[0].open()
    part = cropped_sample.pictures[0].open()
    assert part.size == whole.size
    assert part.tobytes() != whole.tobytes()


# 200 words do not fit in 60 tokens, so that their answer is cut away.
LONG_QUESTION = {"role": "user", "content": "word " * 200}


def test_a_turn_that_is_cut_away_leaves_the_others(tmp_path: Path) -> None:
    """The end of a conversation that is longer than `max_length` is cut."""
    long = Sample("long", (), (QUESTION, ANSWER, LONG_QUESTION, ANSWER))

    cut = collator(processor(), max_length=60)
    batch = cut([long, picture_sample(tmp_path)])

    assert len(batch["input_ids"]) == 2
    assert len(batch["pixel_values"]) == 1


def test_a_guided_turn_that_is_cut_away_takes_its_picture_along(tmp_path: Path) -> None:
    """Each turn is a row of its own; a picture without a row would stand in another one."""
    guided = tiny.processor(tiny.model("text_routed"))
    long_question = {"role": "user", "content": "<image>" + "word " * 200}
    long = Sample(
        "long",
        picture_sample(tmp_path, "of the turn").pictures,
        (QUESTION, ANSWER, long_question, ANSWER),
    )

    cut = collator(guided, max_length=60)
    batch = cut([long, picture_sample(tmp_path)])

    assert len(batch["input_ids"]) == 2
    assert len(batch["pixel_values"]) == 1


def test_a_sample_whose_answer_is_cut_away_is_named() -> None:
    sample = Sample("gone", (), (LONG_QUESTION, ANSWER))

    with pytest.raises(ValueError, match="sample gone: no token is labelled"):
        collator(processor(), max_length=60)([sample])
