"""Stages train what they name, in the right precision; stopping and continuing changes nothing."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from layerfuse.data.collate import Collator
from layerfuse.data.feature_store import cached_features
from layerfuse.data.sources import Samples, load
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.schema import Data, Recipe, Stage
from layerfuse.train.arm import encoder_for, train_arm
from layerfuse.train.stages import begin_stage, count_parameters, end_stage, parameter_groups
from layerfuse.train.trainer import FusionTrainer
from tests import tiny

DATA = Data(path="unused.json")


def stage(**settings: Any) -> Stage:
    base: dict[str, Any] = {"data": DATA, "learning_rates": {"fusion": 1e-3}, "batch_size": 4}
    return Stage.model_validate({**base, **settings})


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"learning_rates": {"fusion": 1}}, {"fusion"}),
        ({"learning_rates": {"fusion": 1, "llm": 1}}, {"fusion", "language_model"}),
        ({"learning_rates": {"vision": 1}}, {"vision_tower"}),
        (
            {"learning_rates": {"fusion": 1, "llm": 1}, "lora": {"target_modules": ["q_proj"]}},
            {"fusion", "language_model"},
        ),
    ],
)
def test_parts_train_in_float32_and_the_rest_is_frozen(
    settings: dict[str, Any], trained: set[str]
) -> None:
    model = tiny.model("concat")
    chosen = stage(**settings)
    names = {n for n, _ in model.named_parameters()}
    adapted = begin_stage(model, chosen, torch.bfloat16)
    moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in moving} == trained
    assert {p.dtype for p in moving.values()} == {torch.float32}
    if chosen.lora:
        own = [n for n in moving if n.startswith("language_model")]
        assert own
        assert all("lora_" in n for n in own)
    still = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in still} == {torch.bfloat16}
    assert count_parameters(model)["trained"] == sum(p.numel() for p in moving.values())
    end_stage(model, adapted, torch.bfloat16)
    assert {n for n, _ in model.named_parameters()} == names
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"learning_rates": {"fusion": 1}}, {"fusion"}),
        ({"learning_rates": {"fusion": 1, "llm": 1}}, {"fusion", "language_model"}),
        ({"learning_rates": {"vision": 1}}, {"vision_tower"}),
        (
            {"learning_rates": {"llm": 1}, "lora": {"target_modules": ["q_proj"], "dropout": 0.5}},
            {"language_model"},
        ),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_frozen_is_in_evaluation_mode(
    settings: dict[str, Any], trained: set[str], checkpointing: bool
) -> None:
    model = tiny.model("concat", encoder="dinov2")
    adapted = begin_stage(model, stage(**settings), torch.float32)
    if checkpointing:
        model.activation_checkpointing_enable()
    # as the trainer does before the first step
    model.train()
    assert model.training
    blocks = {id(block) for block in model.get_decoder().layers}
    if checkpointing:
        # also those of a frozen LLM: gradients pass through it
        assert all(block.training for block in model.get_decoder().layers)
    for name, part in model.named_children():
        for module in part.modules():
            is_block = checkpointing and isinstance(module, GradientCheckpointingLayer)
            if id(module) not in blocks and not is_block:
                assert module.training == (name in trained)
    if adapted is not None:
        dropouts = [m for n, m in model.named_modules() if "lora_dropout" in n]
        assert dropouts
        assert all(module.training for module in dropouts)
    end_stage(model, adapted, torch.float32)
    assert not any(module.training for module in model.modules())


def test_learning_rates_per_part_and_no_decay_on_biases() -> None:
    model = tiny.model("concat")
    chosen = stage(learning_rates={"fusion": 1e-3, "llm": 2e-5}, weight_decay=0.1)
    begin_stage(model, chosen, torch.float32)
    decayed = {n for n, p in model.named_parameters() if p.ndim > 1}
    groups = parameter_groups(model, chosen, decayed)
    moving = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in groups) == len(moving)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rate[id(p)] == (1e-3 if name.startswith("fusion") else 2e-5)
            assert decay[id(p)] == (0.1 if p.ndim > 1 else 0.0)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A float32 recipe on tiny saved models and twelve pictures."""
    monkeypatch.setenv("LAYERFUSE_HOME", str(tmp_path / "home"))
    torch.manual_seed(1)
    AutoModel.from_config(tiny.vision_config("dinov2")).save_pretrained(tmp_path / "encoder")
    tiny.image_processor().save_pretrained(tmp_path / "encoder")
    AutoModelForCausalLM.from_config(tiny.text_config("llama")).save_pretrained(tmp_path / "llm")
    tiny.tokenizer().save_pretrained(tmp_path / "llm")
    records = []
    for k in range(12):
        Image.new("RGB", (40, 30), f"rgb({20 * k},0,90)").save(tmp_path / f"{k}.png")
        talk = [{"from": "human", "value": "<image> n?"}, {"from": "gpt", "value": str(k % 3)}]
        records.append({"id": str(k), "image": f"{k}.png", "conversations": talk})
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = {"path": str(tmp_path / "data.json")}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "encoder": str(tmp_path / "encoder"),
            "llm": str(tmp_path / "llm"),
            "dtype": "float32",
            "arms": [{"layers": [2, 4], "fusion": {"name": "concat", "normalize": "standardize"}}],
            "stages": {
                "align": {
                    "data": data,
                    "prompt": "plain",
                    "learning_rates": {"fusion": 1e-2},
                    "batch_size": 4,
                    "steps": 3,
                    "checkpoint_steps": 2,
                },
                "finetune": {
                    "data": data,
                    "learning_rates": {"fusion": 1e-2, "llm": 1e-2},
                    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
                    "batch_size": 4,
                    "device_batch_size": 2,
                    "steps": 5,
                    "checkpoint_steps": 2,
                },
            },
            "evaluate": {"data": data},
        }
    )


def train(recipe: Recipe, folder: Path) -> tuple[FusionVLM, dict[str, list[tuple[int, float]]]]:
    samples: dict[str, Samples] = {n: load(s.data) for n, s in recipe.stages.items()}
    arm = recipe.all_arms()[0]
    trained = train_arm(recipe, arm, 0, samples=samples, store=None, folder=folder)
    assert set(trained.seconds) == set(recipe.stages)
    return trained.model, trained.losses


def test_training_learns_and_only_moves_what_it_should(recipe: Recipe, tmp_path: Path) -> None:
    model, losses = train(recipe, tmp_path / "run")
    assert [step for step, _ in losses["align"]] == [1, 2, 3]
    assert [step for step, _ in losses["finetune"]] == [1, 2, 3, 4, 5]
    assert losses["finetune"][-1][1] < losses["finetune"][0][1]
    stock = AutoModel.from_pretrained(recipe.encoder.model).state_dict()
    for name, value in model.vision_tower.tower.state_dict().items():
        assert torch.equal(value, stock[name]), name
    llm = AutoModelForCausalLM.from_pretrained(recipe.llm.model).state_dict()
    moved = {n for n, p in model.language_model.state_dict().items() if not torch.equal(p, llm[n])}
    assert moved
    assert all("q_proj" in name or "v_proj" in name for name in moved)


@pytest.mark.parametrize(("stopped_in", "at"), [("align", 3), ("finetune", 1), ("finetune", 5)])
def test_stopped_and_continued_is_bit_equal(
    recipe: Recipe,
    tmp_path: Path,
    stopped_in: str,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, losses = train(recipe, tmp_path / "whole")
    original = FusionTrainer.training_step

    def stop(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
        here = Path(str(self.args.output_dir)).name
        if here == stopped_in and self.state.global_step == at - 1:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    monkeypatch.setattr(FusionTrainer, "training_step", original)
    kept = list((tmp_path / "run").glob(f"stages/{stopped_in}/checkpoint-*"))
    assert len(kept) == (at > 2)  # the newest alone
    found, again = train(recipe, tmp_path / "run")
    assert again == losses
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_accumulation_gives_the_same_training(recipe: Recipe, tmp_path: Path) -> None:
    """Two forwards of two samples are one of four."""
    _, losses = train(recipe, tmp_path / "accumulated")
    one = recipe.stages["finetune"].model_copy(update={"device_batch_size": None})
    whole = recipe.model_copy(update={"stages": {**recipe.stages, "finetune": one}})
    _, expected = train(whole, tmp_path / "whole")
    for (_, a), (_, b) in zip(losses["finetune"], expected["finetune"], strict=True):
        assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.parametrize("grouped", [True, False])
def test_steps_do_not_depend_on_how_a_batch_is_split(
    recipe: Recipe, tmp_path: Path, grouped: bool
) -> None:
    """An epoch has whole batches, filled by samples that come twice, whatever a device holds."""
    curves = []
    for device in (None, 1):
        changes = {"device_batch_size": device, "steps": None, "epochs": 2.0, "batch_size": 5}
        align = recipe.stages["align"].model_copy(update={**changes, "group_by_length": grouped})
        one = recipe.model_copy(update={"stages": {"align": align}})
        _, losses = train(one, tmp_path / f"run{device}")
        curves.append(losses["align"])
    count = len(load(recipe.stages["align"].data))
    assert count % 5
    assert len(curves[0]) == len(curves[1]) == 2 * (count // 5 + 1)
    for (_, a), (_, b) in zip(*curves, strict=True):
        assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.parametrize("llm", tiny.LLMS)
@torch.no_grad()
def test_after_a_stage_the_model_is_what_loading_it_gives(llm: str, tmp_path: Path) -> None:
    """Casting leaves alone what no checkpoint holds, such as rotary frequencies."""
    model = tiny.model("concat", llm=llm, normalize="standardize")
    end_stage(model, begin_stage(model, stage(), torch.bfloat16), torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = FusionVLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.bfloat16
    ids = torch.randint(4, 300, (2, 200))
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_loss_that_is_not_finite_stops_the_training(recipe: Recipe, tmp_path: Path) -> None:
    rates = {"fusion": 1e30}
    wild = {n: s.model_copy(update={"learning_rates": rates}) for n, s in recipe.stages.items()}
    with pytest.raises(ValueError, match=r"the loss became .* at step \d+: lower the learning"):
        train(recipe.model_copy(update={"stages": {"align": wild["align"]}}), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "named", "not_named"),
    [
        (
            {"batch_size": 12, "device_batch_size": 6, "learning_rates": {"llm": 1e-3}},
            ["device_batch_size=3", "activation_checkpointing=true", "lora={}"],
            [],
        ),
        ({"batch_size": 9}, ["device_batch_size=3", "activation_checkpointing"], ["lora"]),
        (
            {"device_batch_size": 1, "learning_rates": {"llm": 1e-3}, "lora": {}},
            ["activation_checkpointing"],
            ["device_batch_size", "lora"],
        ),
        (
            {"device_batch_size": 1, "activation_checkpointing": True},
            ["max_length", "resources.accelerate"],
            ["device_batch_size", "activation_checkpointing", "lora"],
        ),
    ],
)
def test_out_of_memory_keeps_its_type_and_says_what_helps_this_stage(
    recipe: Recipe,
    tmp_path: Path,
    settings: dict[str, Any],
    named: list[str],
    not_named: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FusionTrainer, "training_step", full)
    alone = stage(**{**settings, "data": recipe.stages["align"].data, "steps": 1})
    recipe = recipe.model_copy(update={"stages": {"alone": alone}})
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        train(recipe, tmp_path / "run")
    (note,) = caught.value.__notes__
    assert "stage 'alone' ran out of memory" in note
    assert all(text in note for text in named)
    assert not any(text in note for text in not_named)
    assert any(entry.name == "full" for entry in caught.traceback)
    for text in note.split("`")[1::2]:  # what it advises is a valid override
        key, _, value = text.partition("=")
        if value:
            changed = {**alone.model_dump(), key.split(".")[-1]: yaml.safe_load(value)}
            Stage.model_validate(changed)


def test_a_checkpoint_torn_by_a_kill_is_not_continued(recipe: Recipe, tmp_path: Path) -> None:
    torn = tmp_path / "run" / "stages" / "align" / "checkpoint-2"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    (torn / "trainer_state.json").write_text("{}")  # the first process was done, others not
    _, losses = train(recipe, tmp_path / "run")
    assert [step for step, _ in losses["align"]] == [1, 2, 3]


def test_a_batch_of_text_alone_trains_the_fusion_with_zero_gradient() -> None:
    model = tiny.model("concat").train()
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)
    ids = torch.randint(4, 300, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.fusion.parameters())


def test_features_are_used_only_while_the_encoder_is_the_one_that_made_them(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that trains the encoder, and all after it, encode pictures themselves, also when the
    training continues after that stage."""
    align, finetune = recipe.stages["align"], recipe.stages["finetune"]
    vision = align.model_copy(update={"learning_rates": {"vision": 1e-3}})
    stages = {"align": align, "vision": vision, "finetune": finetune}
    recipe = recipe.model_copy(update={"stages": stages})
    used: list[bool] = []

    class Watched(Collator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            used.append(args[3] is not None)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("layerfuse.train.arm.Collator", Watched)
    samples = {n: load(s.data) for n, s in stages.items()}
    pictures = [p for s in samples["align"] for p in s.pictures]
    store = cached_features(partial(encoder_for, recipe), tiny.image_processor(), pictures)

    def run() -> None:
        arm = recipe.all_arms()[0]
        train_arm(recipe, arm, 0, samples=samples, store=store, folder=tmp_path / "run")

    run()
    assert used == [True, False, False]
    used.clear()
    run()  # the checkpoints of the last stage are there: only it is entered again
    assert used == [False]
    assert not recipe.test_reads_cache()


@pytest.mark.parametrize("setting", ["drop_path_rate", "attention_probs_dropout_prob"])
def test_a_frozen_encoder_gives_the_same_losses_cached_or_not(
    recipe: Recipe, tmp_path: Path, setting: str
) -> None:
    """Encoders come with drop path and dropout in their configs, which are for their own
    training."""
    config = AutoConfig.from_pretrained(recipe.encoder.model, **{setting: 0.7})
    AutoModel.from_pretrained(recipe.encoder.model, config=config).save_pretrained(tmp_path / "own")
    tiny.image_processor().save_pretrained(tmp_path / "own")
    own = {**recipe.model_dump(), "encoder": str(tmp_path / "own"), "stages": {}}
    own["stages"]["align"] = recipe.stages["align"].model_dump()
    changed = Recipe.model_validate(own)
    arm = changed.all_arms()[0]
    samples = {"align": load(changed.stages["align"].data)}
    pictures = [p for s in samples["align"] for p in s.pictures]
    store = cached_features(partial(encoder_for, changed), tiny.image_processor(), pictures)
    curves = []
    for number, read in enumerate([store, None]):
        folder = tmp_path / str(number)
        trained = train_arm(changed, arm, 0, samples=samples, store=read, folder=folder)
        curves.append([loss for _, loss in trained.losses["align"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
