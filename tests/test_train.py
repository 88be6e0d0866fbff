"""Training an arm: stopping and continuing changes nothing, nor does how a batch is split."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from layerfuse.data.collate import Collator
from layerfuse.data.feature_store import FeatureStore, cached_features
from layerfuse.data.lazy_records import Samples
from layerfuse.data.sources import load
from layerfuse.errors import LayerfuseError
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.recipe.stage import Stage
from layerfuse.train.arm import Trained, compose, encoder_for, train_arm
from layerfuse.train.trainer import FusionTrainer
from tests import tiny
from tests.studies import read_samples, write_recipe, write_samples


def write_twelve_samples(folder: Path) -> None:
    """Twelve samples on the eight pictures: three batches of four, an epoch of three steps."""
    samples = []
    for number in range(12):
        talk = [
            {"from": "human", "value": "<image> n?"},
            {"from": "gpt", "value": str(number % 3)},
        ]
        picture = f"{number % 8}.png"
        samples.append({"id": str(number), "image": picture, "conversations": talk})
    write_samples(folder, samples)


@pytest.fixture
def two_stages(recipe: dict[str, Any], tmp_path: Path) -> Recipe:
    """A float32 recipe of one arm on tiny saved models and twelve samples."""
    write_twelve_samples(tmp_path)
    # Measured before the first stage: an arm that continues must have the same constants.
    fusion = {"name": "concat", "normalize": "standardize"}
    align = {
        "data": {"path": "data.json"},
        "prompt": "plain",
        "learning_rates": {"fusion": 1e-2},
        "batch_size": 4,
        "steps": 3,
        "checkpoint_steps": 2,
    }
    finetune = {
        "data": {"path": "data.json"},
        "learning_rates": {"fusion": 1e-2, "llm": 1e-2},
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "batch_size": 4,
        "device_batch_size": 2,
        "steps": 5,
        "checkpoint_steps": 2,
    }
    recipe["arms"] = [{"layers": [2, 4], "fusion": fusion}]
    recipe["stages"] = {"align": align, "finetune": finetune}
    return load_recipe(write_recipe(tmp_path, recipe))


def with_stages(recipe: Recipe, **stages: Stage) -> Recipe:
    """The recipe with these stages in the place of its own."""
    return recipe.model_copy(update={"stages": stages})


def changed(stage: Stage, **settings: Any) -> Stage:
    return stage.model_copy(update=settings)


def samples_by_stage(recipe: Recipe) -> dict[str, Samples]:
    samples = {}
    for name, stage in recipe.stages.items():
        samples[name] = load(stage.data)
    return samples


def train(recipe: Recipe, folder: Path, store: FeatureStore | None = None) -> Trained:
    """Train the recipe's only arm with seed 0; without a store it encodes its pictures itself."""
    (arm,) = recipe.all_arms()
    return train_arm(
        recipe,
        arm,
        0,
        samples=samples_by_stage(recipe),
        store=store,
        folder=folder,
    )


def steps_of(trained: Trained, stage: str) -> list[int]:
    return [step for step, _ in trained.losses[stage]]


def losses_of(trained: Trained, stage: str) -> list[float]:
    return [loss for _, loss in trained.losses[stage]]


def assert_same_weights(trained: Trained, expected: Trained) -> None:
    """Equal to the last bit."""
    weights = trained.model.state_dict()
    for name, expected_weight in expected.model.state_dict().items():
        assert torch.equal(weights[name], expected_weight), name


def test_training_learns_and_only_moves_what_it_should(two_stages: Recipe, tmp_path: Path) -> None:
    trained = train(two_stages, tmp_path / "run")

    assert set(trained.seconds) == set(two_stages.stages)
    assert steps_of(trained, "align") == [1, 2, 3]
    assert steps_of(trained, "finetune") == [1, 2, 3, 4, 5]
    losses = losses_of(trained, "finetune")
    assert losses[-1] < losses[0]

    # No stage names the encoder.
    stock_encoder = AutoModel.from_pretrained(two_stages.encoder.model).state_dict()
    for name, weight in trained.model.vision_tower.tower.state_dict().items():
        assert torch.equal(weight, stock_encoder[name]), name

    # Merged adapters move the matrices that they were added to, and no others.
    stock_llm = AutoModelForCausalLM.from_pretrained(two_stages.llm.model).state_dict()
    moved = []
    for name, weight in trained.model.language_model.state_dict().items():
        if not torch.equal(weight, stock_llm[name]):
            moved.append(name)
    assert moved
    assert all("q_proj" in name or "v_proj" in name for name in moved)


def train_until(
    recipe: Recipe,
    folder: Path,
    *,
    stopped_in: str,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Train as a user does who presses Ctrl-C in a stage, in the step of this number."""
    training_step = FusionTrainer.training_step

    def step_or_stop(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
        # A stage's checkpoints are in a folder of its name.
        stage = Path(str(self.args.output_dir)).name
        if stage == stopped_in and self.state.global_step == at - 1:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "training_step", step_or_stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder)


@pytest.mark.parametrize(
    ("stopped_in", "at"),
    [
        ("align", 3),
        # Checkpoints are saved each two steps: here is none of this stage yet.
        ("finetune", 1),
        ("finetune", 5),
    ],
)
def test_stopped_and_continued_is_bit_equal(
    two_stages: Recipe,
    tmp_path: Path,
    stopped_in: str,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The states of optimizer and schedule and the place in the order of samples must be saved."""
    expected = train(two_stages, tmp_path / "whole")
    train_until(
        two_stages,
        tmp_path / "run",
        stopped_in=stopped_in,
        at=at,
        monkeypatch=monkeypatch,
    )
    checkpoints = list((tmp_path / "run").glob(f"stages/{stopped_in}/checkpoint-*"))
    # Only the newest is left: each holds the model and twice as much of the optimizer's.
    assert len(checkpoints) == (at > 2)

    continued = train(two_stages, tmp_path / "run")

    assert continued.losses == expected.losses
    assert_same_weights(continued, expected)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "dinov3", "vit"])
@pytest.mark.parametrize("stopped_in", ["align", "finetune"])
def test_an_encoder_that_trains_is_continued_as_it_was(
    two_stages: Recipe,
    tmp_path: Path,
    family: str,
    stopped_in: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some families are released with other names of weights than transformers' models have."""
    torch.manual_seed(1)
    AutoModel.from_config(tiny.vision_config(family)).save_pretrained(tmp_path / "encoder")
    tiny.image_processor().save_pretrained(tmp_path / "encoder")
    (arm,) = two_stages.all_arms()
    arm = arm.model_copy(update={"fusion": {"name": "concat"}})
    recipe = with_stages(
        two_stages.model_copy(update={"arms": [arm]}),
        align=changed(two_stages.stages["align"], learning_rates={"fusion": 1e-2, "vision": 1e-2}),
        finetune=two_stages.stages["finetune"],
    )
    expected = train(recipe, tmp_path / "whole")
    train_until(recipe, tmp_path / "run", stopped_in=stopped_in, at=3, monkeypatch=monkeypatch)

    continued = train(recipe, tmp_path / "run")

    assert continued.losses == expected.losses
    assert_same_weights(continued, expected)


def test_a_checkpoint_with_other_names_is_refused(
    two_stages: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not found in it would go on untrained."""
    run = tmp_path / "run"
    train_until(two_stages, run, stopped_in="align", at=3, monkeypatch=monkeypatch)
    (file,) = run.glob("stages/align/checkpoint-2/model.safetensors")
    weights = load_file(file)
    weights["renamed.weight"] = weights.pop(next(name for name in weights if "fusion" in name))
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(LayerfuseError, match="2 weights have other names, such as fusion"):
        train(two_stages, run)


def test_a_continued_stage_took_the_time_of_all_its_steps(
    two_stages: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a report would say that runs that were killed are cheap."""
    run = tmp_path / "run"
    train_until(two_stages, run, stopped_in="finetune", at=3, monkeypatch=monkeypatch)
    (state_file,) = run.glob("stages/finetune/checkpoint-2/trainer_state.json")
    state = json.loads(state_file.read_text())
    assert 0 < state["log_history"][0]["seconds"] < state["log_history"][1]["seconds"] < 60
    # As if its two steps had taken an hour.
    state["log_history"][1]["seconds"] = 3600.0
    state_file.write_text(json.dumps(state))

    continued = train(two_stages, run)

    assert 3600 < continued.seconds["finetune"] < 3660


def without_checkpoint_steps(recipe: Recipe) -> Recipe:
    stages = {}
    for name, stage in recipe.stages.items():
        stages[name] = changed(stage, checkpoint_steps=None)
    return with_stages(recipe, **stages)


def saved_steps(run: Path, stage: str) -> list[int]:
    """The steps of a stage whose checkpoints are on disk."""
    checkpoints = run.glob(f"stages/{stage}/checkpoint-*/complete")
    return [int(file.parent.name.split("-")[1]) for file in checkpoints]


def test_by_default_short_stages_save_no_checkpoints(two_stages: Recipe, tmp_path: Path) -> None:
    """Saving would take more than a fiftieth of their time."""
    recipe = without_checkpoint_steps(two_stages)

    train(recipe, tmp_path / "run")

    assert saved_steps(tmp_path / "run", "align") == []
    assert saved_steps(tmp_path / "run", "finetune") == []


def test_by_default_checkpoints_are_saved_when_they_cost_little(
    two_stages: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here any time is long enough. What the last step of all has trained is kept elsewhere."""
    monkeypatch.setattr("layerfuse.train.trainer.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("layerfuse.train.trainer.LARGEST_SHARE", 1e9)
    recipe = without_checkpoint_steps(two_stages)
    expected = train(recipe, tmp_path / "whole")

    train_until(
        recipe,
        tmp_path / "run",
        stopped_in="finetune",
        at=4,
        monkeypatch=monkeypatch,
    )

    assert saved_steps(tmp_path / "whole", "finetune") == [4]
    assert saved_steps(tmp_path / "run", "align") == [3]
    assert saved_steps(tmp_path / "run", "finetune") == [3]
    continued = train(recipe, tmp_path / "run")
    assert continued.losses == expected.losses
    assert_same_weights(continued, expected)


def test_by_default_slow_disks_get_fewer_checkpoints(
    two_stages: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first checkpoint shows what one costs."""
    monkeypatch.setattr("layerfuse.train.trainer.LEAST_SECONDS", 0.0)
    # Before any is saved, none seems to cost anything.
    monkeypatch.setattr("layerfuse.train.trainer.BYTES_PER_SECOND", 1e18)
    # Ten thousand times what a checkpoint takes: longer than these few steps.
    monkeypatch.setattr("layerfuse.train.trainer.LARGEST_SHARE", 1e-4)
    recipe = without_checkpoint_steps(two_stages)

    train(recipe, tmp_path / "run")

    assert saved_steps(tmp_path / "run", "finetune") == [1]


def test_a_finished_stage_that_ends_within_an_epoch_is_not_trained_further(
    two_stages: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An epoch has three steps: this stage ends with the first step of its second epoch.
    align = changed(two_stages.stages["align"], steps=4)
    recipe = with_stages(
        two_stages,
        align=align,
        finetune=two_stages.stages["finetune"],
    )
    expected = train(recipe, tmp_path / "whole")
    # Before the next stage's first checkpoint: what is continued is the finished stage.
    train_until(
        recipe,
        tmp_path / "run",
        stopped_in="finetune",
        at=1,
        monkeypatch=monkeypatch,
    )

    continued = train(recipe, tmp_path / "run")

    assert steps_of(continued, "align") == [1, 2, 3, 4]
    assert_same_weights(continued, expected)


def test_accumulation_gives_the_same_training(two_stages: Recipe, tmp_path: Path) -> None:
    """Two forwards of two samples are one of four."""
    accumulated = train(two_stages, tmp_path / "accumulated")
    whole_batches = changed(two_stages.stages["finetune"], device_batch_size=None)
    recipe = with_stages(
        two_stages,
        align=two_stages.stages["align"],
        finetune=whole_batches,
    )
    at_once = train(recipe, tmp_path / "whole")

    # Sums in another order round otherwise.
    losses = losses_of(accumulated, "finetune")
    assert losses == pytest.approx(losses_of(at_once, "finetune"), abs=2e-4)


@pytest.mark.parametrize("group_by", ["length", "modality_length", "none"])
def test_steps_do_not_depend_on_how_a_batch_is_split(
    two_stages: Recipe,
    tmp_path: Path,
    group_by: str,
) -> None:
    """An epoch has whole batches, filled by samples that come twice, whatever a device holds."""
    batch_size = 5
    align = changed(
        two_stages.stages["align"],
        batch_size=batch_size,
        group_by=group_by,
        epochs=2.0,
        steps=None,
    )
    one_by_one = changed(align, device_batch_size=1)

    whole = train(with_stages(two_stages, align=align), tmp_path / "whole")
    split = train(with_stages(two_stages, align=one_by_one), tmp_path / "split")

    samples = len(load(align.data))
    # Otherwise no batch would need to be filled.
    assert samples % batch_size != 0
    steps_per_epoch = samples // batch_size + 1
    whole_losses = losses_of(whole, "align")
    split_losses = losses_of(split, "align")
    assert len(whole_losses) == len(split_losses) == 2 * steps_per_epoch
    assert whole_losses == pytest.approx(split_losses, abs=2e-4)


def test_a_loss_that_is_not_finite_stops_the_training(two_stages: Recipe, tmp_path: Path) -> None:
    """It would go on for hours, and save a model of NaN."""
    # Adam moves a weight by about the learning rate: with weights of 1e30 nothing stays finite.
    wild = changed(two_stages.stages["align"], learning_rates={"fusion": 1e30})

    with pytest.raises(ValueError, match=r"the loss became .* at step \d+: lower the learning"):
        train(with_stages(two_stages, align=wild), tmp_path / "run")


def write_texts(folder: Path, file: str) -> None:
    """Write the samples without their pictures into another file."""
    samples = read_samples(folder)
    for sample in samples:
        del sample["image"]
        sample["conversations"][0]["value"] = "What is it?"
    write_samples(folder, samples, file)


def test_constants_are_measured_on_the_first_stage_that_shows_pictures(
    two_stages: Recipe, tmp_path: Path
) -> None:
    write_texts(tmp_path, "text.json")
    align = two_stages.stages["align"]
    text = changed(align, data=Data(path=str(tmp_path / "text.json")))

    trained = train(with_stages(two_stages, text=text, align=align), tmp_path / "text_first")

    expected = train(with_stages(two_stages, align=align), tmp_path / "pictures_alone")
    constants = dict(trained.model.fusion.norms.named_buffers())
    for name, buffer in expected.model.fusion.norms.named_buffers():
        assert torch.equal(constants[name], buffer), name
        assert buffer.std() > 0, "as before any measurement"


def test_constants_need_pictures(two_stages: Recipe, tmp_path: Path) -> None:
    write_texts(tmp_path, "data.json")

    with pytest.raises(LayerfuseError, match="measured on pictures, and no training sample has"):
        train(two_stages, tmp_path / "run")


def assert_valid_overrides(note: str, stage: Stage) -> None:
    """Check that what a note advises, in backticks, are settings that the stage can have."""
    # Every second part of a text that is split at its backticks stood between two of them.
    for advice in note.split("`")[1::2]:
        key, _, value = advice.partition("=")
        if value:
            setting = key.split(".")[-1]
            settings = stage.model_dump()
            settings[setting] = yaml.safe_load(value)
            Stage.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "named", "not_named"),
    [
        (
            {"batch_size": 12, "device_batch_size": 6, "learning_rates": {"llm": 1e-3}},
            ["device_batch_size=3", "activation_checkpointing=true", "lora={}"],
            [],
        ),
        (
            {"batch_size": 9},
            ["device_batch_size=3", "activation_checkpointing"],
            ["lora"],
        ),
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
    two_stages: Recipe,
    tmp_path: Path,
    settings: dict[str, Any],
    named: list[str],
    not_named: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FusionTrainer, "training_step", run_out_of_memory)
    align = two_stages.stages["align"]
    defaults: dict[str, Any] = {
        "data": align.data,
        "learning_rates": {"fusion": 1e-3},
        "batch_size": 4,
        "steps": 1,
    }
    stage = Stage.model_validate({**defaults, **settings})

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        train(with_stages(two_stages, alone=stage), tmp_path / "run")

    (note,) = caught.value.__notes__
    assert "stage 'alone' ran out of memory" in note
    assert all(text in note for text in named)
    assert not any(text in note for text in not_named)
    # The traceback still leads to the line that asked for the memory.
    functions = [entry.name for entry in caught.traceback]
    assert "run_out_of_memory" in functions
    assert_valid_overrides(note, stage)


def test_a_checkpoint_torn_by_a_kill_is_not_continued(two_stages: Recipe, tmp_path: Path) -> None:
    # transformers writes a checkpoint file by file; the mark that all are there is missing.
    torn = tmp_path / "run" / "stages" / "align" / "checkpoint-2"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    # Of several processes the first was done, others were not.
    (torn / "trainer_state.json").write_text("{}")

    trained = train(two_stages, tmp_path / "run")

    assert steps_of(trained, "align") == [1, 2, 3]


def features_of_stage(recipe: Recipe, stage: str) -> FeatureStore:
    """The cached features of all pictures of a stage."""
    pictures = []
    for sample in samples_by_stage(recipe)[stage]:
        pictures += sample.pictures
    return cached_features(
        partial(encoder_for, recipe),
        tiny.image_processor(),
        pictures,
    )


def test_features_are_used_only_while_the_encoder_is_the_one_that_made_them(
    two_stages: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stage that trains the encoder, and all after it, encode pictures themselves, also when the
    training continues after that stage."""
    align = two_stages.stages["align"]
    recipe = with_stages(
        two_stages,
        align=align,
        vision=changed(align, learning_rates={"vision": 1e-3}),
        finetune=two_stages.stages["finetune"],
    )
    reads_cache: list[bool] = []

    class WatchedCollator(Collator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            store = args[3]
            reads_cache.append(store is not None)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("layerfuse.train.arm.Collator", WatchedCollator)
    store = features_of_stage(recipe, "align")

    train(recipe, tmp_path / "run", store)
    assert reads_cache == [True, False, False]

    # The checkpoints of the last stage are there: only it is entered again.
    reads_cache.clear()
    train(recipe, tmp_path / "run", store)
    assert reads_cache == [False]
    assert not recipe.test_reads_cache()


@pytest.mark.parametrize("setting", ["drop_path_rate", "attention_probs_dropout_prob"])
def test_a_frozen_encoder_gives_the_same_losses_cached_or_not(
    two_stages: Recipe,
    tmp_path: Path,
    setting: str,
) -> None:
    """Encoders come with drop path and dropout in their configs, which are for their own
    training."""
    stock = two_stages.encoder.model
    # High enough that it could not be overlooked in the losses.
    config = AutoConfig.from_pretrained(stock, **{setting: 0.7})
    encoder = AutoModel.from_pretrained(stock, config=config)
    encoder.save_pretrained(tmp_path / "own")
    tiny.image_processor().save_pretrained(tmp_path / "own")
    align = two_stages.stages["align"]
    data = two_stages.model_dump()
    data["encoder"] = str(tmp_path / "own")
    data["stages"] = {"align": align.model_dump()}
    recipe = Recipe.model_validate(data)

    store = features_of_stage(recipe, "align")
    cached = train(recipe, tmp_path / "cached", store)
    direct = train(recipe, tmp_path / "direct")

    cached_losses = losses_of(cached, "align")
    assert cached_losses == pytest.approx(losses_of(direct, "align"), rel=1e-5)


def test_without_memory_of_gradients_each_step_moves_by_the_learning_rate(
    two_stages: Recipe, tmp_path: Path
) -> None:
    """With betas of zero AdamW's update is the sign of the gradient."""
    rate = 1e-3
    stage = changed(
        two_stages.stages["align"],
        betas=(0.0, 0.0),
        learning_rates={"fusion": rate},
        steps=2,
        schedule="constant_with_warmup",
        warmup=0,
        checkpoint_steps=None,
    )
    recipe = two_stages.model_copy(update={"stages": {"align": stage}})
    begun, _ = compose(recipe, recipe.all_arms()[0], 0)

    trained = train(recipe, tmp_path)

    before = dict(begun.fusion.projector.named_parameters())
    for name, after in trained.model.fusion.projector.named_parameters():
        steps = (after - before[name]).abs() / rate
        # Both ways, or there and back; a gradient near AdamW's epsilon moves less.
        whole = torch.isclose(steps, steps.round(), atol=1e-2)
        assert whole.float().mean() > 0.95
        assert steps.max() > 1.9
