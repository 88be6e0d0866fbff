"""A stage trains the parts that it names, in the right precision and mode, and nothing else."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.stage import Stage
from layerfuse.train.stages import begin_stage, count_parameters, end_stage, parameter_groups
from tests import tiny
from tests.checkpointing import compute_blocks_anew
from tests.random_prompts import prompts


def make_stage(**settings: Any) -> Stage:
    """A stage with these settings; without any it trains the fusion. Its data is never read."""
    defaults: dict[str, Any] = {
        "data": Data(path="unused.json"),
        "learning_rates": {"fusion": 1e-3},
        "batch_size": 4,
    }
    return Stage.model_validate({**defaults, **settings})


def parts_of(names: list[str]) -> set[str]:
    """The parts of the model that hold the parameters of these names."""
    return {name.split(".")[0] for name in names}


def dtypes_of(parameters: list[nn.Parameter]) -> set[torch.dtype]:
    return {parameter.dtype for parameter in parameters}


@dataclass(frozen=True)
class Training:
    """Settings of a stage, and which parts of the model it trains."""

    settings: dict[str, Any]
    parts: set[str]


FUSION_ALONE = Training(
    {"learning_rates": {"fusion": 1}},
    {"fusion"},
)
FUSION_AND_LLM = Training(
    {"learning_rates": {"fusion": 1, "llm": 1}},
    {"fusion", "language_model"},
)
VISION_ALONE = Training(
    {"learning_rates": {"vision": 1}},
    {"vision_tower"},
)
FUSION_AND_ADAPTERS = Training(
    {
        "learning_rates": {"fusion": 1, "llm": 1},
        "lora": {"target_modules": ["q_proj"]},
    },
    {"fusion", "language_model"},
)
ADAPTERS_WITH_DROPOUT = Training(
    {
        "learning_rates": {"llm": 1},
        "lora": {"target_modules": ["q_proj"], "dropout": 0.5},
    },
    {"language_model"},
)


def _note_dtype(read: list[torch.dtype], module: nn.Module, args: tuple[Tensor]) -> None:
    read.append(args[0].dtype)


def test_adapters_read_no_copy_in_float32_and_learn_the_same() -> None:
    """PEFT makes one of everything that they read, which autocast brings back to bfloat16."""
    gradients = []
    for makes_copies in (False, True):
        model = tiny.model("concat")
        lora = {"target_modules": "all-linear"}
        stage = make_stage(learning_rates={"fusion": 1, "llm": 1}, lora=lora)
        adapted = begin_stage(model, stage, torch.bfloat16)
        read: list[torch.dtype] = []
        for name, module in adapted.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_pre_hook(partial(_note_dtype, read))
            elif isinstance(module, BaseTunerLayer) and makes_copies:
                adapter: Any = module
                adapter.cast_input_dtype_enabled = True
        torch.manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        batch = prompts(model, [1, 1])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        assert (torch.bfloat16 in read) is not makes_copies
        gradients.append([each.grad for each in model.parameters() if each.grad is not None])

    assert len(gradients[0]) > 10
    for without, with_copies in zip(*gradients, strict=True):
        assert torch.equal(without, with_copies)


@pytest.mark.parametrize(
    "training",
    [FUSION_ALONE, FUSION_AND_LLM, VISION_ALONE, FUSION_AND_ADAPTERS],
    ids=["fusion", "fusion+llm", "vision", "fusion+lora"],
)
def test_parts_train_in_float32_and_the_rest_is_frozen(training: Training) -> None:
    """In bfloat16 a small update is rounded away; what is frozen needs only half the memory."""
    model = tiny.model("concat")
    stage = make_stage(**training.settings)
    names_before = {name for name, _ in model.named_parameters()}

    adapted = begin_stage(model, stage, torch.bfloat16)

    trained_names = []
    trained_parameters = []
    frozen_parameters = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained_names.append(name)
            trained_parameters.append(parameter)
        else:
            frozen_parameters.append(parameter)
    assert parts_of(trained_names) == training.parts
    assert dtypes_of(trained_parameters) == {torch.float32}
    assert dtypes_of(frozen_parameters) == {torch.bfloat16}
    if stage.lora is not None:
        # The LLM's own weights stay frozen beside their adapters.
        llm_names = [name for name in trained_names if name.startswith("language_model")]
        assert llm_names
        assert all("lora_" in name for name in llm_names)
    trained_count = sum(parameter.numel() for parameter in trained_parameters)
    assert count_parameters(model)["trained"] == trained_count

    # Afterwards the adapters are part of the weights, which have their own names again.
    end_stage(model, adapted, torch.bfloat16)
    assert {name for name, _ in model.named_parameters()} == names_before
    assert dtypes_of(list(model.parameters())) == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def assert_only_these_parts_train(
    model: FusionVLM,
    trained_parts: set[str],
    checkpointing: bool,
) -> None:
    """Check the mode of every module that its own part decides on.

    Transformers checkpoints the activations of a block in training mode alone. With checkpointing,
    blocks are therefore in that mode wherever gradients pass; what is in them is not.
    """
    # Any: transformers types no decoder with layers
    decoder: Any = model.get_decoder()
    decoder_blocks = list(decoder.layers)
    if checkpointing:
        # Also those of a frozen LLM: gradients pass through it to the fusion.
        assert all(block.training for block in decoder_blocks)
    decoder_block_ids = {id(block) for block in decoder_blocks}
    for name, part in model.named_children():
        for module in part.modules():
            is_decoder_block = id(module) in decoder_block_ids
            is_checkpointed = checkpointing and isinstance(module, GradientCheckpointingLayer)
            if not is_decoder_block and not is_checkpointed:
                assert module.training == (name in trained_parts)


@pytest.mark.parametrize(
    "training",
    [FUSION_ALONE, FUSION_AND_LLM, VISION_ALONE, ADAPTERS_WITH_DROPOUT],
    ids=["fusion", "fusion+llm", "vision", "lora"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_frozen_is_in_evaluation_mode(training: Training, checkpointing: bool) -> None:
    """Dropout in a frozen encoder would make its features other than the cached ones."""
    model = tiny.model("concat", encoder="dinov2")
    adapted = begin_stage(model, make_stage(**training.settings), torch.float32)
    if checkpointing:
        compute_blocks_anew(model)

    # as the trainer does before the first step
    model.train()

    assert model.training
    assert_only_these_parts_train(model, training.parts, checkpointing)
    if adapted is not None:
        # An adapter trains, so that its dropout is on, inside of a frozen LLM.
        dropouts = []
        for name, module in model.named_modules():
            if "lora_dropout" in name:
                dropouts.append(module)
        assert dropouts
        assert all(module.training for module in dropouts)

    end_stage(model, adapted, torch.float32)
    assert not any(module.training for module in model.modules())


def test_learning_rates_per_part_and_no_decay_on_biases() -> None:
    model = tiny.model("concat")
    stage = make_stage(
        learning_rates={"fusion": 1e-3, "llm": 2e-5},
        weight_decay=0.1,
    )
    begin_stage(model, stage, torch.float32)
    # Biases and the weights of norms have one dimension.
    decayed = {name for name, weight in model.named_parameters() if weight.ndim > 1}

    groups = parameter_groups(model, stage, decayed)

    # By identity: a parameter has no name in an optimizer.
    learning_rates = {}
    decays = {}
    grouped = 0
    for group in groups:
        for parameter in group["params"]:
            grouped += 1
            learning_rates[id(parameter)] = group["lr"]
            decays[id(parameter)] = group["weight_decay"]
    trained = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        trained += 1
        expected_rate = 2e-5
        if name.startswith("fusion"):
            expected_rate = 1e-3
        assert learning_rates[id(parameter)] == expected_rate
        expected_decay = 0.0
        if parameter.ndim > 1:
            expected_decay = 0.1
        assert decays[id(parameter)] == expected_decay
    # Each one once: twice in an optimizer it would move twice as far.
    assert grouped == trained


@pytest.mark.parametrize("strategy", FUSIONS)
def test_the_projector_may_have_a_learning_rate_of_its_own(strategy: str) -> None:
    """All projectors of a strategy, and none of what comes before them."""
    model = tiny.model(strategy, normalize="layernorm")
    stage = make_stage(learning_rates={"fusion": 1e-4, "projector": 1e-3}, weight_decay=0.1)
    begin_stage(model, stage, torch.float32)
    names = {id(weight): name for name, weight in model.fusion.named_parameters()}

    groups = parameter_groups(model, stage, decayed=set())

    rates = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            # Twice in an optimizer it would move twice as far.
            assert name not in rates
            rates[name] = group["lr"]
    assert rates.keys() == set(names.values())
    for name, rate in rates.items():
        assert rate == (1e-3 if name.startswith("projector") else 1e-4), name


def test_a_rate_for_projectors_needs_projectors() -> None:
    """A strategy of one's own may have none: the rate would silently do nothing."""
    model = tiny.model("single")
    model.fusion.projector = nn.Linear(8, 8)
    stage = make_stage(learning_rates={"fusion": 1e-4, "projector": 1e-3})
    begin_stage(model, stage, torch.float32)

    with pytest.raises(LayerfuseError, match="the fusion has no Projector"):
        parameter_groups(model, stage, decayed=set())


@pytest.mark.parametrize("llm", tiny.LLMS)
@torch.no_grad()
def test_after_a_stage_the_model_is_what_loading_it_gives(llm: str, tmp_path: Path) -> None:
    """Casting leaves alone what no checkpoint holds, such as rotary frequencies."""
    model = tiny.model("concat", llm=llm, normalize="whiten")
    adapted = begin_stage(model, make_stage(), torch.bfloat16)

    end_stage(model, adapted, torch.bfloat16)

    model.save_pretrained(tmp_path)
    loaded = FusionVLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.bfloat16
    # Rounded frequencies show in late positions: the angle is position times frequency.
    ids = torch.randint(4, 300, (2, 200))
    logits = model(input_ids=ids).logits
    assert torch.equal(logits, loaded(input_ids=ids).logits)


def test_a_batch_of_text_alone_trains_the_fusion_with_zero_gradient() -> None:
    """Zero, not none: data-parallel processes share a gradient of every parameter at each step."""
    model = tiny.model("concat").train()
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)
    ids = torch.randint(4, 300, (2, 9))

    model(input_ids=ids, labels=ids).loss.backward()

    for parameter in model.fusion.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_the_next_stage_computes_no_activations_twice_unless_it_asks() -> None:
    model = tiny.model("concat")
    adapted = begin_stage(model, make_stage(), torch.float32)
    compute_blocks_anew(model)

    end_stage(model, adapted, torch.float32)

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            assert not module.gradient_checkpointing
