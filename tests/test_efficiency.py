"""No wasted arithmetic: what is frozen has no graph, what nobody reads does not run, batches hold
little padding; and what augments or fills a batch is the same however the training was cut."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from layerfuse.data.collate import Collator, LengthGroups, SampleDataset
from layerfuse.data.picture import Picture
from layerfuse.data.sample import Sample
from layerfuse.fusion import FUSIONS
from layerfuse.model.processor import Processor
from layerfuse.recipe.schema import Data, Stage
from layerfuse.train.stages import begin_stage
from tests import tiny

TALK = ({"role": "user", "content": "n?"}, {"role": "assistant", "content": "one"})


def stage(**settings: Any) -> Stage:
    return Stage.model_validate({"data": Data(path="unused.json"), **settings})


def processor(**options: Any) -> Processor:
    return Processor(tiny.image_processor(), tiny.tokenizer(), patch_size=tiny.PATCH, **options)


def shown(folder: Path, name: str = "a") -> Sample:
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / f"{name}.png")
    asked = ({"role": "user", "content": "<image> n?"}, TALK[1])
    return Sample(name, (Picture(str(folder / f"{name}.png")),), asked)


def test_with_only_the_fusion_in_training_nothing_else_has_a_gradient(tmp_path: Path) -> None:
    """Neither the LLM's embeddings nor its weights nor the encoder are part of the graph."""
    model = tiny.model("concat").train()
    begin_stage(model, stage(learning_rates={"fusion": 1e-3}), torch.float32)
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *a: seen.append(a[2]))
    model.vision_tower.register_forward_hook(lambda *a: seen.extend(a[2].patches))
    model(**Collator(processor(), "chat", 512, None)([shown(tmp_path)])).loss.backward()
    assert len(seen) == 1 + len(model.vision_tower.layers)
    assert not any(tensor.requires_grad for tensor in seen)
    moving = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert moving == {"fusion"}


@pytest.mark.parametrize("strategy", list(FUSIONS))
def test_blocks_above_the_deepest_layer_do_not_exist(strategy: str) -> None:
    model = tiny.model(strategy)
    blocks = model.vision_tower.family.blocks(model.vision_tower.tower)
    assert len(blocks) == max(model.vision_tower.layers) <= 4


def test_logits_exist_at_labelled_positions_only(tmp_path: Path) -> None:
    model = tiny.model("concat").train()
    rows: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *a: rows.append(a[2].shape[:-1].numel()))
    batch = Collator(processor(), "chat", 512, None)([shown(tmp_path), Sample("t", (), TALK)])
    model(**batch)
    assert rows == [int((batch["labels"][:, 1:] != -100).sum())]


@pytest.mark.parametrize("parts", [["fusion"], ["vision"], ["fusion", "llm", "vision"]])
def test_text_alone_runs_no_encoder_and_trains_all_parts_with_zero(parts: list[str]) -> None:
    """The same gradients on every process, so that none waits for another."""
    model = tiny.model("concat").train()
    begin_stage(model, stage(learning_rates=dict.fromkeys(parts, 1e-3)), torch.float32)
    model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the encoder ran"))
    model(**Collator(processor(), "chat", 512, None)([Sample("t", (), TALK)])).loss.backward()
    for name in parts:
        own = {"fusion": model.fusion, "vision": model.vision_tower, "llm": model.language_model}
        grads = [p.grad for p in own[name].parameters()]
        assert all(grad is not None for grad in grads)
        assert any(bool(g.any()) for g in grads if g is not None) == (name == "llm")


@pytest.mark.parametrize("strategy", [n for n in FUSIONS if n != "instruction_weighted"])
def test_a_blank_picture_changes_neither_loss_nor_gradients(strategy: str) -> None:
    model = tiny.model(strategy).train()
    reads = processor(fusion=model.config.fusion, layers=len(model.config.vision_layers))
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    for blank in (False, True):
        batch = Collator(reads, "chat", 512, None, blank=blank)([Sample("t", (), TALK)])
        assert ("pixel_values" in batch) == blank
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), kept))
    (plain, one), (filled, other) = found
    assert filled == pytest.approx(plain, abs=1e-5)
    for name, grad in other.items():
        torch.testing.assert_close(
            grad, one.get(name, torch.zeros_like(grad)), atol=1e-5, rtol=1e-4
        )


def test_batches_hold_samples_of_similar_length_in_random_order() -> None:
    lengths = torch.randint(10, 2000, (1000,), generator=torch.Generator().manual_seed(0))
    groups = LengthGroups(lengths, 16, seed=3)
    order = list(groups)
    assert len(groups) == len(order) == 63 * 16
    assert sorted(set(order)) == list(range(1000))  # eight come twice, to fill the last batch
    few = Counter(LengthGroups(lengths[:5], 16, seed=3))
    assert sorted(few) == list(range(5))
    assert set(few.values()) == {3, 4}
    assert list(groups) == order
    groups.set_epoch(1)
    assert list(groups) != order

    def padding(order: list[int]) -> float:
        whole = lengths[torch.tensor(order[:1008])].view(-1, 16).float()
        return float(1 - whole.mean(dim=1).sum() / whole.amax(dim=1).sum())

    assert padding(order) < padding([*range(1000), *range(8)]) / 10
    means = lengths[torch.tensor(order[:1008])].view(-1, 16).float().mean(dim=1)
    rank = torch.corrcoef(torch.stack([means, torch.arange(63.0)]))[0, 1]
    assert abs(float(rank)) < 0.3  # not from short to long


def test_random_crops_depend_on_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    samples = [shown(tmp_path, name) for name in "ab"]

    def boxes(seed: int, epoch: int) -> list[Any]:
        dataset = SampleDataset(samples, 0.5, seed)
        dataset.set_epoch(epoch)
        return [dataset[k].pictures[0].crop for k in (1, 0)]

    assert boxes(0, 0) == boxes(0, 0)
    assert len({str(boxes(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    for left, top, right, bottom in (box for k in range(50) for box in boxes(k, 0)):
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert right - left >= 0.5
        assert bottom - top >= 0.5
    whole, part = (SampleDataset(samples, crop)[0].pictures[0].open() for crop in (None, 0.5))
    assert part.size == whole.size
    assert part.tobytes() != whole.tobytes()


def test_a_guided_turn_that_is_cut_away_leaves_the_others(tmp_path: Path) -> None:
    """As in the unguided row of the same conversation, where `max_length` cuts its end."""
    second = ({"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "two"})
    long = Sample("long", (), (*TALK, *second))
    batch = Collator(processor(), "chat", 60, None)([long, shown(tmp_path)])
    assert len(batch["input_ids"]) == 2
    assert len(batch["pixel_values"]) == 1
    with pytest.raises(ValueError, match="sample gone: no token is labelled"):
        Collator(processor(), "chat", 60, None)([Sample("gone", (), second)])
