"""`layerfuse show`: published counts, without weights or network."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from layerfuse import FusionVLM
from layerfuse.cost.flops import TEXT_TOKENS, BlockRepeats, Known, count, flops, text_config
from layerfuse.cost.recipe_table import Shown, samples_in, show, steps_of
from layerfuse.data.collate import Collator
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS
from layerfuse.model.config import configure
from layerfuse.model.pretrained import decoder_blocks, text_config_of
from layerfuse.recipe.data_source import Data
from layerfuse.recipe.model_source import ModelSource
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import Recipe
from layerfuse.recipe.stage import Stage
from layerfuse.study.check import load_checked
from layerfuse.train.arm import compose
from tests import tiny
from tests.studies import write_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
LLAVA = RECIPES / "llava-1.5-7b.yaml"


def quiet() -> Console:
    """A console that prints nothing."""
    return Console(width=200, quiet=True)


def fusion_parameters(arms: list[Shown]) -> dict[str, int]:
    """The parameters of the fusion by the labels of the arms."""
    return {arm.arm.label: arm.parameters["fusion"] for arm in arms}


def test_llava_1_5_has_its_published_size() -> None:
    """A projector of 20.98 M, 576 tokens, layer 23."""
    _, arms = show(LLAVA, console=quiet())

    arm = arms[0]
    assert arm.visual_tokens == 576
    assert arm.layers == [23]
    first_linear = 1024 * 4096 + 4096
    second_linear = 4096 * 4096 + 4096
    assert arm.parameters["fusion"] == first_linear + second_linear
    assert arm.parameters["llm"] == pytest.approx(6.74e9, rel=0.01)
    assert arm.trained == {
        "align": arm.parameters["fusion"],
        "finetune": arm.parameters["fusion"] + arm.parameters["llm"],
    }


def test_llava_1_5_has_its_published_steps() -> None:
    """558K and 665K samples once."""
    stages = load_recipe(LLAVA).stages

    # 256 samples a step, then 128
    assert steps_of(stages["align"], 558128) == 2181
    assert steps_of(stages["finetune"], 665298) == 5198


def test_flops_of_llava_1_5() -> None:
    _, arms = show(LLAVA, console=quiet())

    # Two FLOPs per weight and token; the embedding of 32000 words is read, not multiplied
    tokens = 576 + 64
    multiplied_weights = 6.74e9 - 32000 * 4096
    expected = 2 * tokens * multiplied_weights
    assert arms[0].flops["llm"] == pytest.approx(expected, rel=0.06)
    assert arms[0].flops["vision"] == pytest.approx(0.37e12, rel=0.05)


def test_fusion_study_has_its_published_parameters() -> None:
    """6.30 M for the MLP, 10.49 M for three layers, 6.30 M for each injected layer."""
    _, arms = shown("fusion-study-triple")

    fusion = fusion_parameters(arms)
    assert fusion["layer 23"] == pytest.approx(6.30e6, rel=2e-3)
    assert fusion["E_D triple"] == pytest.approx(10.49e6, rel=2e-3)
    assert fusion["E_D all"] == pytest.approx(10.49e6, rel=2e-3)
    # Three injected layers and the image tokens themselves
    assert fusion["I_D triple"] == pytest.approx(4 * 6.30e6, rel=2e-3)
    assert arms[0].parameters["llm"] == pytest.approx(1.36e9, rel=0.01)


def test_fusion_study_has_its_published_settings() -> None:
    stages = load_recipe(RECIPES / "fusion-study-triple.yaml").stages

    align = stages["align"]
    assert align.weight_decay == 0.05
    assert align.warmup == 200
    assert align.batch_size == 256
    assert stages["finetune"].learning_rates == {"fusion": 2e-5, "llm": 2e-5}


def test_what_arms_share_is_counted_once_and_only_that() -> None:
    """Else an arm would be given the FLOPs of another."""
    text = tiny.text_config(num_hidden_layers=4)
    selections = [
        [4],
        [1, 4],
        [1, 2, 3, 4],
    ]
    known: Known = {}
    for name in FUSIONS:
        for layers in selections:
            try:
                config = configure(tiny.vision_config(), text, layers, {"name": name})
            except ValueError:
                # Not every strategy takes every selection
                continue
            model, _ = count(config)
            with_others = flops(model, tiny.SIZE, known, ("fusion", "llm"))
            by_itself = flops(model, tiny.SIZE, None, ("fusion", "llm"))
            assert with_others == by_itself, (name, layers)
    # Of 26 that were asked for
    assert len(known) < 12


def test_constants_of_whitening_count_but_do_not_train() -> None:
    """One product of width x width for each token of each layer."""
    plain = show(LLAVA, console=quiet())[1][0]
    whitened = show(LLAVA, ("arms.0.fusion.normalize=whiten",), quiet())[1][0]

    assert whitened.parameters["fusion"] - plain.parameters["fusion"] == 1024 * 1024 + 1024
    assert whitened.flops["fusion"] - plain.flops["fusion"] == 2 * 576 * 1024 * 1024
    assert whitened.trained == plain.trained


def test_lora_counts_what_peft_trains() -> None:
    recipe, arms = show(LLAVA, ("stages.finetune.lora.r=8",), quiet())

    # Each linear map gets r rows and r columns: r * (inputs + outputs) parameters
    attention = 4 * (4096 + 4096)
    mlp = 3 * (4096 + 11008)
    lora = 8 * 32 * (attention + mlp)
    fusion = arms[0].parameters["fusion"]
    assert arms[0].trained["finetune"] == fusion + lora
    assert recipe.stages["finetune"].lora


@pytest.mark.parametrize(
    ("samples", "changes", "steps"),
    [
        # Samples that come twice fill the last batch
        (256 * 10 + 5, {}, 11),
        (256 * 10 + 5, {"device_batch_size": 1}, 11),
        (256 * 10 + 40, {}, 11),
        (100, {"device_batch_size": None}, 1),
        (2560, {"epochs": 2.5}, 25),
        (2560, {"steps": 7}, 7),
    ],
)
def test_steps_follow_epochs_and_accumulation(
    samples: int, changes: dict[str, Any], steps: int
) -> None:
    align = load_recipe(LLAVA).stages["align"]
    stage = Stage.model_validate({**align.model_dump(), **changes})

    assert steps_of(stage, samples) == steps


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scenes": {"count": 9}}, 9),
        ({"scenes": {"count": 9}, "skip": 2}, 7),
        ({"scenes": {"count": 9}, "skip": 2, "limit": 5}, 5),
        ({"scenes": {"count": 9}, "skip": 6, "limit": 5}, 3),
        ({"path": "elsewhere.json", "expected_samples": 9, "skip": 2}, 7),
        # Of data that is elsewhere the limit alone is known.
        ({"path": "elsewhere.json", "limit": 5}, 5),
        ({"path": "elsewhere.json"}, None),
    ],
)
def test_samples_are_counted_behind_those_that_are_skipped(
    settings: dict[str, Any], expected: int | None
) -> None:
    assert samples_in(Data.model_validate(settings)) == expected


def test_a_model_without_configuration_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LayerfuseError, match="write `config:` in the recipe"):
        show(LLAVA, (f"llm={tmp_path / 'none'}",), quiet())


# Parameters of the MLP that the papers' projectors share, for an LLM of width 4096.
MLP = 20.98e6
# The same for MobileLLaMA-1.4B, and what each injected layer adds to it.
SMALL_MLP = 6.30e6
CROSS_ATTENTION_AND_MLP = 51.4e6
PUBLISHED = {
    "llava-1.5-7b": {"llava-1.5": MLP},
    "dense-connector": {"SCI": 29.37e6, "DCI": 29.37e6, "STI": MLP},
    "mmfuser": {"MMFuser": MLP + 5_190_592},
    "mmfuser-13b": {"MMFuser": 1024 * 5120 + 5120 + 5120 * 5120 + 5120 + 5_190_592},
    "igva": {
        "IGVA": 25.17e6 + 27.05e6,
        "IGVA averaged": 25.17e6 + 27.05e6,
        "static mix": 25.17e6,
    },
    "tgif": {"TGIF": MLP + 2.1e6},
    "tgif-siglip": {"TGIF": MLP + 2.1e6},
    "light-fusion": {"3, 18, 23": 3072 * 2048 + 2048},
    "layer-probing": {"single 1": 1024 * 2048 + 2048, "single 24": 1024 * 2048 + 2048},
    "fusion-study-triple": {"E_D triple": 10.49e6, "I_D triple": 4 * SMALL_MLP},
    "fusion-study-grid": {
        "E_D single": 8.39e6,
        "E_D double": 10.49e6,
        "E_D former": 8.39e6,
        "E_D all": 10.49e6,
        "E_M single": SMALL_MLP + 4.60e6,
        "E_M double": SMALL_MLP + 4.80e6,
        "E_M latter": SMALL_MLP + 6.76e6,
        "E_M all": SMALL_MLP + 9.13e6,
        "I_D former": 13 * SMALL_MLP,
        "I_D all": 25 * SMALL_MLP,
        "I_M former": 13 * SMALL_MLP + 12 * CROSS_ATTENTION_AND_MLP,
        "I_M all": 25 * SMALL_MLP + 24 * CROSS_ATTENTION_AND_MLP,
    },
    "internal-growth": {
        # Without the MLP
        "pre all": 25 * SMALL_MLP + 24 * 16.8e6,
        "post all": 25 * SMALL_MLP + 24 * 16.8e6,
        "parallel all": 25 * SMALL_MLP + 24 * 16.8e6,
    },
    "fusion-study-siglip": {"E_D triple": 3 * 1152 * 2048 + 2048 + 2048 * 2048 + 2048},
    "fusion-study-siglip-2.7b": {"E_D triple": 3 * 1152 * 2560 + 2560 + 2560 * 2560 + 2560},
    "internal-fusion": {
        "I_D": 3 * 6.30e6,
        # With the attention of two blocks
        "I_M pre": 3 * 6.30e6 + 2 * 51.4e6,
    },
    "molmo": {"Molmo's layers": 25.17e6},
}
"""Parameters of the fusion, by recipe and arm."""

AT_PUBLISHED_SCALE = [
    path.stem for path in sorted(RECIPES.glob("*.yaml")) if load_recipe(path).encoder.config
]
"""Recipes that hold the configuration of their encoder, to be shown without weights or network."""


@cache
def shown(recipe: str) -> tuple[Recipe, list[Shown]]:
    """What `show` gives of a recipe, which takes seconds for many arms."""
    return show(RECIPES / f"{recipe}.yaml", console=quiet())


@pytest.fixture(scope="module", params=AT_PUBLISHED_SCALE)
def at_published_scale(request: pytest.FixtureRequest) -> str:
    """Each recipe at the published scale; of a module, so that tests of one come together."""
    return request.param


def test_recipes_of_the_papers_have_their_published_parameters(at_published_scale: str) -> None:
    _, arms = shown(at_published_scale)

    fusion = fusion_parameters(arms)
    for name, parameters in PUBLISHED[at_published_scale].items():
        assert fusion[name] == pytest.approx(parameters, rel=2e-3), name


def test_recipes_of_the_papers_have_their_published_tokens(at_published_scale: str) -> None:
    _, arms = shown(at_published_scale)

    for arm in arms:
        # Only STI adds pooled tokens to the 24 x 24 patches; SigLIP-SO400M has 27 x 27
        expected = 576
        if arm.arm.label == "STI":
            expected = 720
        elif at_published_scale.startswith("fusion-study-siglip"):
            expected = 729
        assert arm.visual_tokens == expected, arm.arm.label


def test_the_page_lists_every_recipe_of_the_papers(at_published_scale: str) -> None:
    page = (RECIPES.parent / "docs" / "published-scale.md").read_text("utf-8")

    assert f"](../recipes/{at_published_scale}.yaml)" in page


def shown_layers(recipe: str) -> dict[str, list[int]]:
    """The layers that each arm reads, by its label."""
    _, arms = shown(recipe)
    return {arm.arm.label: arm.layers for arm in arms}


def test_the_grid_has_the_published_sets_of_layers() -> None:
    """Six sets for each of four ways to fuse, read together with the base layer."""
    layers = shown_layers("fusion-study-grid")

    assert len(layers) == 1 + 6 * 4
    for strategy in ("E_D", "E_M", "I_D", "I_M"):
        sets = {
            "single": {18},
            "double": {3, 18},
            "triple": {3, 18, 23},
            "former": set(range(1, 13)),
            "latter": set(range(13, 25)),
            "all": set(range(1, 25)),
        }
        for name, expected in sets.items():
            # Every arm has layer 23 as its base, whether it is in the set or not
            selected = set(layers[f"{strategy} {name}"]) | {23}
            assert selected == expected | {23}, (strategy, name)


def test_siglip_has_the_released_sets_of_layers() -> None:
    """Of 27 blocks the release leaves out the last."""
    for recipe in ("fusion-study-siglip", "fusion-study-siglip-2.7b"):
        layers = shown_layers(recipe)

        assert layers["layer 25"] == [25]
        assert layers["E_D triple"] == [3, 20, 25]
        assert layers["I_M triple"] == [3, 20, 25]
        assert layers["E_D latter"] == list(range(15, 27))


def test_every_layer_is_probed() -> None:
    layers = shown_layers("layer-probing")

    assert list(layers.values()) == [[layer] for layer in range(1, 25)]


def test_the_fuser_of_mmfuser_13b_aligns_slower_than_its_projector() -> None:
    stages = load_recipe(RECIPES / "mmfuser-13b.yaml").stages

    assert stages["align"].learning_rates == {"fusion": 1e-4, "projector": 1e-3}
    assert stages["finetune"].learning_rates == {"fusion": 2e-5, "llm": 2e-5}
    # 7B has one rate for both
    stages_7b = load_recipe(RECIPES / "mmfuser.yaml").stages
    assert stages_7b["align"].learning_rates == {"fusion": 1e-3}


def test_a_projector_with_its_own_rate_is_counted_once() -> None:
    _, arms = shown("mmfuser-13b")

    for arm in arms:
        assert arm.trained["align"] == arm.parameters["fusion"]


def test_recipes_of_the_papers_train_as_llava(at_published_scale: str) -> None:
    """Each has LLaVA-1.5's data, of which 40K samples are text alone, and its squares."""
    recipe, arms = shown(at_published_scale)

    assert len(arms) == len(recipe.all_arms())
    assert recipe.image_aspect_ratio == "pad"
    assert recipe.stages["finetune"].group_by == "modality_length"
    steps = {}
    for name, stage in recipe.stages.items():
        assert stage.data.expected_samples is not None
        steps[name] = steps_of(stage, stage.data.expected_samples)
    assert steps == {"align": 2181, "finetune": 5198}


def test_every_strategy_has_a_recipe_at_the_published_scale() -> None:
    strategies = set()
    for recipe in AT_PUBLISHED_SCALE:
        for arm in load_recipe(RECIPES / f"{recipe}.yaml").all_arms():
            strategies.add(arm.fusion["name"])

    assert strategies == set(FUSIONS)


def run_every_block(
    repeats: BlockRepeats,
    forward: Callable[..., Any],
    kind: object,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stand in for `BlockRepeats.run`, without its shortcut."""
    return forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("fusion", "layers"),
    [
        ({"name": "single"}, [4]),
        ({"name": "inject_add"}, [1, 4]),
        ({"name": "inject_cross"}, [1, 4]),
        # Inside the block, where a block that is not run would lose it
        ({"name": "inject_cross", "position": "parallel"}, [1, 4]),
    ],
)
def test_blocks_of_one_kind_are_counted_as_if_each_ran(
    fusion: dict[str, Any],
    layers: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shortcut changes no number: injected blocks are told from plain ones."""
    text = tiny.text_config(num_hidden_layers=6)
    config = configure(tiny.vision_config(), text, layers, fusion)
    model, _ = count(config)

    short = flops(model, tiny.SIZE)
    monkeypatch.setattr(BlockRepeats, "run", run_every_block)
    whole = flops(model, tiny.SIZE)

    assert whole == short
    # The stand-in of a block's forward is gone afterwards
    for block in decoder_blocks(model.language_model):
        assert "forward" not in vars(block)


def test_the_row_of_an_added_image_token_is_counted(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """As many parameters as the model that training composes."""
    without_image = tiny.tokenizer(image=False)
    llm = tiny.text_config(vocab_size=len(without_image))
    AutoModelForCausalLM.from_config(llm).save_pretrained(tmp_path / "llm")
    without_image.save_pretrained(tmp_path / "llm")

    _, arms = show(write_recipe(tmp_path, recipe), console=quiet())

    for shown in arms:
        model = FusionVLM.compose(
            tmp_path / "encoder",
            tmp_path / "llm",
            shown.layers,
            shown.arm.fusion,
        )
        in_training = sum(weight.numel() for weight in model.language_model.parameters())
        assert shown.parameters["llm"] == in_training
        assert model.language_model.get_input_embeddings().num_embeddings == llm.vocab_size + 1


MIXTURE = {"num_attention_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OTHER_LLMS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "qwen3_next": {
        **MIXTURE,
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "gemma3n_text": {
        "intermediate_size": [48] * 4,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "qwen3_moe": {**MIXTURE, "num_experts": 4},
}
"""Settings of LLMs of other builds: with experts, with state spaces, with other positions."""


def llm_flops(family: str, **changes: Any) -> int:
    """FLOPs of a tiny LLM of a family of `OTHER_LLMS`."""
    settings = tiny.text_config().to_dict()
    common = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    chosen = {key: settings[key] for key in common}
    settings = {**chosen, "num_hidden_layers": 4, **OTHER_LLMS[family], **changes}
    text = AutoConfig.for_model(family, **settings)
    model, _ = count(configure(tiny.vision_config(), text, [4], {"name": "single"}))
    return flops(model, tiny.SIZE)["llm"]


@pytest.mark.parametrize("family", ["opt", "jamba", "qwen3_next"])
def test_llms_of_other_builds_are_counted(family: str) -> None:
    # At the least the head: two FLOPs per weight and token
    assert llm_flops(family) > 2 * 32 * tiny.text_config().vocab_size * (16 + TEXT_TOKENS)


def test_an_expert_counts_for_the_tokens_that_it_reads() -> None:
    """Each token is read by two experts, however many there are to choose from."""
    tokens = 16 + TEXT_TOKENS
    # Of four blocks: the router's products for each of four more experts
    routers = 4 * 2 * tokens * 32 * 4
    # Three matrices of an expert
    expert = 4 * 2 * tokens * 3 * 32 * 16

    of_four = llm_flops("qwen3_moe")

    assert llm_flops("qwen3_moe", num_experts=8) - of_four == routers
    assert llm_flops("qwen3_moe", num_experts_per_tok=3) - of_four == expert


def test_an_llm_that_cannot_be_counted_is_named() -> None:
    with pytest.raises(LayerfuseError, match="FLOPs of an LLM of type 'gemma3n_text' cannot be"):
        llm_flops("gemma3n_text")


def test_an_encoder_is_no_llm() -> None:
    with pytest.raises(LayerfuseError, match="is no language model"):
        text_config_of(tiny.vision_config("dinov2"))


def test_a_multimodal_llm_is_refused_as_training_does() -> None:
    """Its text part alone would be counted, and training would then refuse it."""
    source = ModelSource(model="some/llava", config={"model_type": "llava"})

    with pytest.raises(ValueError, match="multimodal model"):
        text_config(source)


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_nothing_is_cut_off(width: int) -> None:
    """At any width of the terminal all labels and numbers can be read."""
    console = Console(
        record=True,
        width=width,
        quiet=False,
        file=io.StringIO(),
    )

    _, arms = show(RECIPES / "igva.yaml", console=console)

    text = console.export_text()
    assert "…" not in text
    for line in text.splitlines():
        assert len(line.rstrip()) <= width
    # A narrow table breaks a label between its words
    words = " ".join(text.split())
    for arm in arms:
        assert arm.arm.label in words
        billions = arm.flops["llm"] / 1e9
        assert f"{billions:,.1f}" in words
    assert "fusion 2e-05, llm 2e-05" in words


def test_the_tokens_are_those_of_training(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Image processors crop to sizes of their own, which the encoder's configuration lacks."""
    processor = tiny.image_processor(height=24, width=24)
    processor.save_pretrained(tmp_path / "encoder")
    early_tokens = {
        "name": "early",
        "layers": [1, 2, 3, 4],
        "fusion": {"name": "token_concat"},
    }
    recipe["arms"].append(early_tokens)

    settings, arms = show(write_recipe(tmp_path, recipe), console=quiet())

    samples = load_checked(settings).usable
    for shown in arms:
        _, processor = compose(settings, shown.arm, seed=0)
        batch = Collator(processor, "chat", 2048, None)([samples.test[0]])
        image_places = batch["input_ids"] == processor.image_token_id
        assert shown.visual_tokens == int(image_places.sum()), shown.arm.label
    # patches of 8 pixels; the encoder is configured for pictures of 32
    assert arms[0].visual_tokens == 9
