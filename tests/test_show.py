"""`layerfuse show`: published counts, without weights or network."""

import io
from pathlib import Path

import pytest
from rich.console import Console

import layerfuse.cost.flops
from layerfuse.cost.flops import count, flops, text_config
from layerfuse.cost.recipe_table import show, steps_of
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS
from layerfuse.model.config import configure
from layerfuse.model.pretrained import text_config_of
from layerfuse.recipe.reader import load_recipe
from layerfuse.recipe.schema import ModelSource, Stage
from tests import tiny

RECIPES = Path(__file__).parent.parent / "recipes"


def quiet() -> Console:
    return Console(width=200, quiet=True)


def test_llava_1_5_has_its_published_numbers() -> None:
    """A projector of 20.98 M, 576 tokens, 558K and 665K samples once."""
    recipe, arms = show(RECIPES / "llava-1.5-7b.yaml", console=quiet())
    arm = arms[0]
    assert arm.visual_tokens == 576
    assert arm.layers == [23]
    assert arm.parameters["fusion"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert arm.parameters["llm"] == pytest.approx(6.74e9, rel=0.01)
    assert arm.trained == {
        "align": arm.parameters["fusion"],
        "finetune": arm.parameters["fusion"] + arm.parameters["llm"],
    }
    assert steps_of(recipe.stages["align"], 558128) == 2181
    assert steps_of(recipe.stages["finetune"], 665298) == 5198
    text = 2 * (576 + 64) * (6.74e9 - 32000 * 4096)  # two FLOPs per weight and token
    assert arm.flops["llm"] == pytest.approx(text, rel=0.06)
    assert arm.flops["vision"] == pytest.approx(0.37e12, rel=0.05)


def test_fusion_study_has_its_published_numbers() -> None:
    """6.30 M for the MLP, 10.49 M for three layers, 6.30 M for each injected layer."""
    recipe, arms = show(RECIPES / "fusion-study-triple.yaml", console=quiet())
    fusion = {arm.arm.label: arm.parameters["fusion"] for arm in arms}
    assert fusion["layer 23"] == pytest.approx(6.30e6, rel=2e-3)
    assert fusion["E_D triple"] == pytest.approx(10.49e6, rel=2e-3)
    assert fusion["E_D all"] == pytest.approx(10.49e6, rel=2e-3)
    assert fusion["I_D triple"] == pytest.approx(4 * 6.30e6, rel=2e-3)
    assert arms[0].parameters["llm"] == pytest.approx(1.36e9, rel=0.01)
    align = recipe.stages["align"]
    assert (align.weight_decay, align.warmup, align.batch_size) == (0.05, 200, 256)
    assert recipe.stages["finetune"].learning_rates == {"fusion": 2e-5, "llm": 2e-5}


def test_what_arms_share_is_counted_once_and_only_that() -> None:
    text, known = tiny.text_config(num_hidden_layers=4), {}
    for name in FUSIONS:
        for layers in ([4], [1, 4], [1, 2, 3, 4]):
            try:
                config = configure(tiny.vision_config(), text, layers, {"name": name})
            except ValueError:
                continue  # not every strategy takes every selection
            model, _ = count(config)
            parts = ("fusion", "llm")
            shared, alone = (flops(model, tiny.SIZE, k, parts) for k in (known, {}))
            assert shared == alone, (name, layers)
    assert len(known) < 12  # of 26


def test_lora_counts_what_peft_trains() -> None:
    recipe, arms = show(RECIPES / "llava-1.5-7b.yaml", ("stages.finetune.lora.r=8",), quiet())
    linear = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    expected = arms[0].parameters["fusion"] + 8 * linear
    assert arms[0].trained["finetune"] == expected
    assert recipe.stages["finetune"].lora


def test_steps_follow_epochs_and_accumulation() -> None:
    stage = load_recipe(RECIPES / "llava-1.5-7b.yaml").stages["align"]

    def steps(samples: int, **changes: object) -> int:
        return steps_of(Stage.model_validate({**stage.model_dump(), **changes}), samples)

    assert steps(256 * 10 + 5) == 11  # samples that come twice fill the last batch
    assert steps(256 * 10 + 5, device_batch_size=1) == 11
    assert steps(256 * 10 + 40) == 11
    assert steps(100, device_batch_size=None) == 1
    assert steps(2560, epochs=2.5) == 25
    assert steps(2560, steps=7) == 7


def test_a_model_without_configuration_is_a_clear_error(tmp_path: Path) -> None:
    text = (RECIPES / "llava-1.5-7b.yaml").read_text()
    broken = text.replace("lmsys/vicuna-7b-v1.5", str(tmp_path / "none"))
    head, tail = broken.split("llm:\n")
    lines = tail.splitlines()
    kept = [lines[0], *lines[next(i for i, x in enumerate(lines) if x.startswith("chat_")) :]]
    (tmp_path / "r.yaml").write_text(head + "llm:\n" + "\n".join(kept))
    with pytest.raises(LayerfuseError, match="write `config:` in the recipe"):
        show(tmp_path / "r.yaml", console=quiet())


PUBLISHED = {
    "dense-connector": {"SCI": 29.37e6, "DCI": 29.37e6, "STI": 20.98e6},
    "mmfuser": {"MMFuser": 20.98e6 + 5_190_592},
    "igva": {"IGVA": 25.17e6 + 27.05e6, "static mix": 25.17e6},
    "tgif": {"TGIF": 20.98e6 + 2.1e6},
    "light-fusion": {"3, 18, 23": 3072 * 2048 + 2048},
    "internal-fusion": {"I_D": 3 * 6.30e6, "I_M pre": 3 * 6.30e6 + 2 * 51.4e6},
    "molmo": {"Molmo's layers": 25.17e6},
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_of_the_papers_have_their_published_parameters(recipe: str) -> None:
    _, arms = show(RECIPES / f"{recipe}.yaml", console=quiet())
    found = {arm.arm.label: arm for arm in arms}
    for name, parameters in PUBLISHED[recipe].items():
        assert found[name].parameters["fusion"] == pytest.approx(parameters, rel=2e-3), name
    tokens = {label: arm.visual_tokens for label, arm in found.items()}
    assert tokens == {label: 720 if label == "STI" else 576 for label in found}


def test_every_strategy_has_a_recipe_at_the_published_scale() -> None:
    used = set()
    for path in RECIPES.glob("*.yaml"):
        recipe = load_recipe(path)
        if recipe.encoder.config is not None:
            used |= {arm.fusion["name"] for arm in recipe.all_arms()}
    assert used == set(FUSIONS)


@pytest.mark.parametrize("name", ["single", "inject_add", "inject_cross"])
def test_blocks_of_one_kind_are_counted_as_if_each_ran(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortcut changes no number: injected blocks are told from plain ones."""
    text = tiny.text_config(num_hidden_layers=6)
    model, _ = count(
        configure(tiny.vision_config(), text, [4] if name == "single" else [1, 4], {"name": name})
    )
    short = flops(model, tiny.SIZE)
    kinds = iter(range(1000))
    monkeypatch.setattr(layerfuse.cost.flops, "_kind_of", lambda block: next(kinds))
    assert flops(model, tiny.SIZE) == short
    blocks = [*model.language_model.get_decoder().layers]
    assert all("forward" not in vars(block) for block in blocks)


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
    console = Console(record=True, width=width, quiet=False, file=io.StringIO())
    _, arms = show(RECIPES / "igva.yaml", console=console)
    text = console.export_text()
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    words = " ".join(text.split())
    for shown in arms:
        assert shown.arm.label in words
        assert f"{shown.flops['llm'] / 1e9:,.1f}" in words
    assert "fusion 2e-05, llm 2e-05" in words
