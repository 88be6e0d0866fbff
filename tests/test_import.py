"""`layerfuse import`: checkpoints of every release give what the release computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration
from typer.testing import CliRunner

from layerfuse import FusionVLM, Processor
from layerfuse.errors import LayerfuseError
from layerfuse.export.formats import export
from layerfuse.released.importing import Elsewhere, import_checkpoint
from layerfuse_cli.app import app
from tests import releases, tiny
from tests.releases import (
    LLM_WIDTH,
    MLP_SETTINGS,
    WIDTH,
    Aggregator,
    HiddenStates,
    Release,
    Tensors,
    apply_fuser,
    apply_linear,
    apply_mlp,
    apply_norm,
)
from tests.stock_folders import save_stock

PIXELS = (2, 3, tiny.SIZE, tiny.SIZE)
PROJECTOR = "model.mm_projector"
STUDY_PROJECTOR = "model.mm_projector_f"
Project = Callable[[Tensors, HiddenStates], Tensor]


def release(
    settings: dict[str, Any], added: Tensors, blocks: int = 2, **of_encoder: Any
) -> Release:
    """A checkpoint of tiny parts, with so many blocks of the LLM."""
    tower = releases.encoder(**of_encoder)
    return Release(tower, releases.llm(blocks), {**MLP_SETTINGS, **settings}, added)


def imported(folder: Path, layout: str, given: Release, **options: Any) -> FusionVLM:
    """The model that is made of a checkpoint, loaded from where it was written."""
    checkpoint = given.write(folder)
    import_checkpoint(str(checkpoint), layout, folder / "model", Elsewhere(**options))
    return FusionVLM.from_pretrained(folder / "model").eval()


def prompts() -> Tensor:
    """(2, T) tokens: words, sixteen image tokens, words."""
    image = torch.full((2, 16), tiny.IMAGE_ID)
    torch.manual_seed(3)
    words = torch.randint(10, 250, (2, 9))
    return torch.cat([words[:, :4], image, words[:, 4:]], dim=1)


@torch.no_grad()
def check_logits(model: FusionVLM, given: Release, visual: Tensor, added: Any = None) -> None:
    """Compare the whole model with the stock LLM around the visual tokens of the formulas."""
    ids = prompts()
    expected = releases.logits_of(given.language_model, ids, visual, added)
    logits = model(input_ids=ids, pixel_values=pixels()).logits
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, atol=2e-4, rtol=1e-4)


def pixels() -> Tensor:
    torch.manual_seed(5)
    return torch.randn(PIXELS)


def llava_release(**settings: Any) -> Release:
    torch.manual_seed(1)
    return release({"mm_vision_select_layer": -2, **settings}, releases.mlp(PROJECTOR))


def test_llava_reads_the_second_last_layer(tmp_path: Path) -> None:
    given = llava_release()

    model = imported(tmp_path, "llava-1.5", given)

    assert model.config.vision_layers == [23]
    states = given.hidden_states(pixels())
    check_logits(model, given, apply_mlp(given.added, PROJECTOR, states[23]))


def test_a_linear_projector_is_one_linear(tmp_path: Path) -> None:
    torch.manual_seed(1)
    given = release(
        {"mm_vision_select_layer": 18, "mm_projector_type": "linear"},
        releases.linear(PROJECTOR, WIDTH, LLM_WIDTH),
    )

    model = imported(tmp_path, "llava-1.5", given)

    assert model.config.vision_layers == [18]
    states = given.hidden_states(pixels())
    check_logits(model, given, apply_linear(given.added, PROJECTOR, states[18]))


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    given = llava_release()
    checkpoint = given.write(tmp_path)

    report = import_checkpoint(str(checkpoint), "llava-1.5", tmp_path / "model")

    assert report.used["fusion"] == sorted(given.added)
    assert report.used["LLM"] == sorted(given.language_model.state_dict())
    assert report.ignored == {
        "computed from the configuration": ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    }
    written = json.loads((tmp_path / "model" / "import.json").read_text())
    assert written["used"]["fusion"] == sorted(given.added)


@pytest.mark.parametrize("written", [[3, 8, 13, 18, 23], "list-22/-17/-12/-7/-2"])
def test_mmfuser_looks_up_four_layers(written: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    added = {**releases.fuser(f"{PROJECTOR}.0", 4), **releases.mlp(PROJECTOR, first=1)}
    given = release({"mm_vision_select_layer": written}, added)

    model = imported(tmp_path, "mmfuser", given)

    assert model.config.vision_layers == [3, 8, 13, 18]
    states = given.hidden_states(pixels())
    layers = [states[layer] for layer in (3, 8, 13, 18)]
    fused = apply_fuser(added, f"{PROJECTOR}.0", layers, states[23])
    check_logits(model, given, apply_mlp(added, PROJECTOR, fused, first=1))


def mean(states: HiddenStates, first: int, last: int) -> Tensor:
    return torch.stack(states[first : last + 1]).mean(dim=0)


def sti(tensors: Tensors, states: HiddenStates) -> Tensor:
    pooled = [torch.nn.functional.avg_pool1d(states[layer].mT, 8).mT for layer in (7, 15)]
    return apply_mlp(tensors, PROJECTOR, torch.cat([states[23], *pooled], dim=1))


def sci(tensors: Tensors, states: HiddenStates) -> Tensor:
    return apply_mlp(tensors, PROJECTOR, torch.cat([states[23], states[7], states[15]], dim=-1))


def dci(tensors: Tensors, states: HiddenStates) -> Tensor:
    parts = [states[23], mean(states, 0, 11), mean(states, 12, 23)]
    return apply_mlp(tensors, PROJECTOR, torch.cat(parts, dim=-1))


@pytest.mark.parametrize(("kind", "project", "parts"), [("sci", sci, 3), ("dci", dci, 3)])
def test_dense_connector_sets_layers_side_by_side(
    kind: str, project: Project, parts: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    settings = {"mm_dense_connector_type": kind, "mm_vision_select_layer": -2}
    given = release(settings, releases.mlp(PROJECTOR, parts * WIDTH))

    model = imported(tmp_path, "dense-connector", given)

    check_logits(model, given, project(given.added, given.hidden_states(pixels())))


@torch.no_grad()
def test_dense_connector_pools_early_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    settings = {"mm_dense_connector_type": "sti", "mm_vision_select_layer": -2}
    given = release(settings, releases.mlp(PROJECTOR))

    model = imported(tmp_path, "dense-connector", given)

    expected = sti(given.added, given.hidden_states(pixels()))
    tokens = model.fuse(model.vision_tower(pixels())).tokens
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_dense_connector_of_siglip_counts_from_a_tower_without_its_last_block(
    tmp_path: Path,
) -> None:
    torch.manual_seed(1)
    settings = {"mm_dense_connector_type": "dci", "mm_vision_select_layer": -2}
    given = release(settings, releases.mlp(PROJECTOR, 3 * WIDTH), depth=27, name="siglip")

    model = imported(tmp_path, "dense-connector", given)

    states = given.hidden_states(pixels(), drop_first=False)
    parts = [states[26], mean(states, 0, 12), mean(states, 13, 25)]
    expected = apply_mlp(given.added, PROJECTOR, torch.cat(parts, dim=-1))
    tokens = model.fuse(model.vision_tower(pixels())).tokens
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("used", "parts"),
    [
        ("18", [(18, 18), (23, 23)]),
        ("3-18-23", [(3, 3), (18, 18), (23, 23)]),
        ("former", [(1, 12), (23, 23)]),
        ("latter", [(13, 24), (23, 23)]),
        ("all", [(1, 12), (13, 24), (23, 23)]),
    ],
)
def test_external_direct_fusion(used: str, parts: list[tuple[int, int]], tmp_path: Path) -> None:
    torch.manual_seed(1)
    settings = {"layer_using_strategy": used, "layer_fusing_strategy": "E_D"}
    given = release(settings, releases.mlp(STUDY_PROJECTOR, len(parts) * WIDTH))

    model = imported(tmp_path, "layer-select-fuse", given)

    states = given.hidden_states(pixels())
    side_by_side = torch.cat([mean(states, *part) for part in parts], dim=-1)
    check_logits(model, given, apply_mlp(given.added, STUDY_PROJECTOR, side_by_side))


@pytest.mark.parametrize(("used", "layers"), [("18", [18]), ("3-18-23", [3, 18])])
def test_external_modular_fusion(used: str, layers: list[int], tmp_path: Path) -> None:
    torch.manual_seed(1)
    added = {
        **releases.fuser(f"{STUDY_PROJECTOR}.0", len(layers)),
        **releases.mlp(STUDY_PROJECTOR, first=1),
    }
    given = release({"layer_using_strategy": used, "layer_fusing_strategy": "E_M"}, added)

    model = imported(tmp_path, "layer-select-fuse", given)

    states = given.hidden_states(pixels())
    read = [states[layer] for layer in layers]
    fused = apply_fuser(added, f"{STUDY_PROJECTOR}.0", read, states[23])
    check_logits(model, given, apply_mlp(added, STUDY_PROJECTOR, fused, first=1))


@pytest.mark.parametrize(
    ("used", "blocks"),
    [
        ("3-18-23", {3: 2, 18: 17, 23: 22}),
        ("latter", {layer: layer - 1 for layer in range(13, 25)}),
        ("all", {layer: layer - 1 for layer in range(1, 25)}),
    ],
)
def test_internal_direct_fusion(used: str, blocks: dict[int, int], tmp_path: Path) -> None:
    """With twelve and more projectors, number 1 is not number 10."""
    torch.manual_seed(1)
    added = releases.mlp(STUDY_PROJECTOR)
    for index in range(len(blocks)):
        added.update(releases.mlp(f"model.mm_projectors.{index}"))
    given = release({"layer_using_strategy": used, "layer_fusing_strategy": "I_D"}, added, 24)

    model = imported(tmp_path, "layer-select-fuse", given)

    states = given.hidden_states(pixels())
    before: dict[int, Tensor] = {}
    for index, (layer, block) in enumerate(blocks.items()):
        before[block] = apply_mlp(added, f"model.mm_projectors.{index}", states[layer])
    check_logits(model, given, apply_mlp(added, STUDY_PROJECTOR, states[23]), before)


@torch.no_grad()
def test_internal_modular_fusion_fills_the_published_blocks(tmp_path: Path) -> None:
    """Its residual is the release's; the mask is not, which a note says."""
    torch.manual_seed(1)
    added = releases.mlp(STUDY_PROJECTOR)
    inner = releases.llm(1).config.intermediate_size
    for index, block in enumerate((2, 17)):
        added.update(releases.mlp(f"model.mm_projectors.{index}"))
        there = f"model.layers.{block}"
        added[f"{there}.ucross_xattn.weight"] = torch.tensor([0.5 + index])
        added[f"{there}.ucross_xmlp.weight"] = torch.tensor([-0.5 - index])
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = releases.random(LLM_WIDTH, LLM_WIDTH)
            added[f"{there}.ucross_attn.{part}.weight"] = weight
        for part in ("gate_proj", "up_proj"):
            added[f"{there}.ucross_mlp.{part}.weight"] = releases.random(inner, LLM_WIDTH)
        added[f"{there}.ucross_mlp.down_proj.weight"] = releases.random(LLM_WIDTH, inner)
        added[f"{there}.ucross_attn.rotary_emb.inv_freq"] = torch.ones(4)
    given = release({"layer_using_strategy": "3-18", "layer_fusing_strategy": "I_M"}, added, 24)
    checkpoint = given.write(tmp_path)

    report = import_checkpoint(str(checkpoint), "layer-select-fuse", tmp_path / "model")

    assert "its own, and this model at all patches" in report.notes[0]
    model = FusionVLM.from_pretrained(tmp_path / "model").eval()
    states = given.hidden_states(pixels())
    memory: dict[int, Tensor] = {}
    for index, (layer, block) in enumerate(((3, 2), (18, 17))):
        memory[block] = apply_mlp(added, f"model.mm_projectors.{index}", states[layer])
    visual = apply_mlp(added, STUDY_PROJECTOR, states[23])
    ids = prompts()
    expected = releases.logits_with_cross(given.language_model, ids, visual, added, memory)
    logits = model(input_ids=ids, pixel_values=pixels()).logits
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, atol=2e-4, rtol=1e-4)


IGVA = {
    "vit_aggregate_groups": str([list(range(k + 1, k + 7)) for k in (0, 6, 12, 18)]),
    "vit_base_layer": 23,
    "aggregate_by_average": False,
    "sentence_embedder": "all-minilm-l6-v2",
    "sentence_embed_dim": 12,
    "aggregator_num_transformers": 4,
    "aggregator_num_heads": 4,
    "aggregator_hidden_dim": WIDTH,
}


@torch.no_grad()
def test_igva_weighs_groups_by_the_sentence(tmp_path: Path) -> None:
    torch.manual_seed(1)
    aggregator = Aggregator(4, 12).eval()
    added = releases.mlp(PROJECTOR, 2 * WIDTH)
    for name, tensor in aggregator.state_dict().items():
        tensor.normal_(std=0.4)
        added[f"model.vision_aggregator.{name}"] = tensor
    added["model.sentence_embedder.0.anything"] = torch.ones(2)
    given = release(IGVA, added)

    model = imported(tmp_path, "igva", given)

    sentence = torch.randn(2, 12)
    whole = given.tower(pixels(), output_hidden_states=True).hidden_states
    groups = [torch.stack(whole[k + 1 : k + 7]).mean(dim=0) for k in (0, 6, 12, 18)]
    summaries = torch.stack([group[:, 0] for group in groups], dim=1)
    weights = aggregator(summaries, sentence)
    patches = torch.stack([group[:, 1:] for group in groups], dim=1)
    mix = (weights[:, :, None, None] * patches).sum(dim=1)
    expected = apply_mlp(added, PROJECTOR, torch.cat([whole[23][:, 1:], mix], dim=-1))
    tokens = model.fuse(model.vision_tower(pixels()), sentence).tokens
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_the_first_stage_of_igva_is_a_plain_mean(tmp_path: Path) -> None:
    torch.manual_seed(1)
    added = releases.mlp(PROJECTOR, 2 * WIDTH)
    given = release({**IGVA, "aggregate_by_average": True}, added)

    model = imported(tmp_path, "igva", given)

    states = given.hidden_states(pixels())
    side_by_side = torch.cat([states[23], mean(states, 1, 24)], dim=-1)
    check_logits(model, given, apply_mlp(added, PROJECTOR, side_by_side))


@torch.no_grad()
def test_tgif_weighs_all_layers_by_the_prompt(tmp_path: Path) -> None:
    torch.manual_seed(1)
    router = f"{PROJECTOR}.layer_selector.layer_weights_projection"
    added = {
        **releases.linear(f"{router}.0", LLM_WIDTH, 512),
        **releases.linear(f"{router}.2", 512, 24),
        **releases.norm(f"{PROJECTOR}.layer_selector.norm"),
        **releases.mlp(f"{PROJECTOR}.mlp"),
    }
    settings = {"mm_projector_type": "layer_selector", "mm_vision_select_layer": -2}
    given = release(settings, added)

    model = imported(tmp_path, "tgif", given)

    prompt = torch.randn(2, LLM_WIDTH)
    hidden = apply_linear(added, f"{router}.0", prompt).relu()
    weights = apply_linear(added, f"{router}.2", hidden).softmax(-1)
    states = given.hidden_states(pixels())
    layers = torch.stack(states[1:], dim=1)
    mix = layers[:, -2] + (weights[:, :, None, None] * layers).sum(dim=1)
    normed = apply_norm(added, f"{PROJECTOR}.layer_selector.norm", mix)
    expected = apply_mlp(added, f"{PROJECTOR}.mlp", normed)
    tokens = model.fuse(model.vision_tower(pixels()), prompt).tokens
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_a_projector_alone_is_put_on_its_llm(tmp_path: Path) -> None:
    given = llava_release()
    checkpoint = given.write(tmp_path, whole=False)

    import_checkpoint(
        str(checkpoint), "llava-1.5", tmp_path / "model", Elsewhere(base=str(tmp_path / "llm"))
    )

    model = FusionVLM.from_pretrained(tmp_path / "model").eval()
    states = given.hidden_states(pixels())
    check_logits(model, given, apply_mlp(given.added, PROJECTOR, states[23]))


def test_an_adapter_is_merged_into_its_llm(tmp_path: Path) -> None:
    """As LLaVA writes them: the adapter's file, and beside it what was trained without one."""
    from peft import LoraConfig, get_peft_model

    given = llava_release()
    checkpoint = given.write(tmp_path, whole=False)
    (checkpoint / "mm_projector.bin").unlink()
    prefixed = {f"base_model.model.{name}": value for name, value in given.added.items()}
    torch.save(prefixed, checkpoint / "non_lora_trainables.bin")
    torch.manual_seed(4)
    config: Any = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapted: Any = get_peft_model(releases.llm(2), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    settings = (checkpoint / "config.json").read_text()
    adapted.save_pretrained(checkpoint)
    (checkpoint / "config.json").write_text(settings)

    report = import_checkpoint(
        str(checkpoint), "llava-1.5", tmp_path / "model", Elsewhere(base=str(tmp_path / "llm"))
    )

    assert len(report.used["adapter"]) == 2 * 2 * 2
    given.language_model = adapted.merge_and_unload().eval()
    model = FusionVLM.from_pretrained(tmp_path / "model").eval()
    states = given.hidden_states(pixels())
    check_logits(model, given, apply_mlp(given.added, PROJECTOR, states[23]))


def test_a_tower_that_was_trained_too_is_the_checkpoints_own(tmp_path: Path) -> None:
    given = llava_release()
    for name, tensor in releases.encoder().state_dict().items():
        own = f"model.vision_tower.vision_tower.vision_model.{name}"
        given.added[own] = tensor + 0.05 if tensor.ndim > 1 else tensor.clone()
    own_ids = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    given.added[own_ids] = torch.arange(17).unsqueeze(0)

    model = imported(tmp_path, "llava-1.5", given)

    for name, tensor in given.tower.state_dict().items():
        if tensor.ndim > 1:
            given.tower.state_dict()[name].add_(0.05)
    states = given.hidden_states(pixels())
    check_logits(model, given, apply_mlp(given.added, PROJECTOR, states[23]))


def test_from_a_release_to_transformers_and_back(tmp_path: Path) -> None:
    given = llava_release()
    checkpoint = given.write(tmp_path)
    import_checkpoint(str(checkpoint), "llava-1.5", tmp_path / "model")

    stock = export(tmp_path / "model", "llava", tmp_path / "stock").folder
    report = import_checkpoint(str(stock), "llava-hf", tmp_path / "again")

    assert report.layers == [23]
    llava: Any = LlavaForConditionalGeneration.from_pretrained(stock)
    model = FusionVLM.from_pretrained(tmp_path / "again").eval()
    ids = prompts()
    with torch.no_grad():
        expected = llava.eval()(input_ids=ids, pixel_values=pixels()).logits
        logits = model(input_ids=ids, pixel_values=pixels()).logits
    assert torch.equal(logits, expected)


@torch.no_grad()
def test_a_tower_without_what_lies_above_its_layers_is_enough(tmp_path: Path) -> None:
    """DenseConnector deletes SigLIP's last block and its head before it saves."""
    torch.manual_seed(1)
    settings = {"mm_dense_connector_type": "dci", "mm_vision_select_layer": -2}
    given = release(settings, releases.mlp(PROJECTOR, 3 * WIDTH), depth=27, name="siglip")
    for name, tensor in given.tower.state_dict().items():
        if "layers.26." not in name and not name.startswith("head"):
            given.added[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor.clone()

    model = imported(tmp_path, "dense-connector", given)

    assert model.config.vision_config.num_hidden_layers == 27
    states = given.hidden_states(pixels(), drop_first=False)
    parts = [states[26], mean(states, 0, 12), mean(states, 13, 25)]
    expected = apply_mlp(given.added, PROJECTOR, torch.cat(parts, dim=-1))
    tokens = model.fuse(model.vision_tower(pixels())).tokens
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_a_projector_alone_need_not_name_its_class(tmp_path: Path) -> None:
    """LLaVA's code saves the config of the LLM that it started from, with its class."""
    given = llava_release(architectures=["LlamaForCausalLM"])
    checkpoint = given.write(tmp_path, whole=False)

    report = import_checkpoint(
        str(checkpoint), "llava-1.5", tmp_path / "model", Elsewhere(base=str(tmp_path / "llm"))
    )

    assert report.layers == [23]


def test_phi_keeps_its_final_norm_and_its_share_of_rotation(tmp_path: Path) -> None:
    given = llava_release()
    phi: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "phi",
            hidden_size=LLM_WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=320,
            partial_rotary_factor=0.25,
        )
    )
    given.language_model = phi.eval()
    checkpoint = given.write(tmp_path)
    file = checkpoint / "config.json"
    settings = {
        **json.loads(file.read_text()),
        "architectures": ["LlavaPhiForCausalLM"],
        "partial_rotary_factor": 0.25,
    }
    settings.pop("rope_parameters")
    file.write_text(json.dumps(settings))
    template = Elsewhere(chat_template=tiny.CHAT_TEMPLATE)

    import_checkpoint(str(checkpoint), "llava-1.5", tmp_path / "model", template)

    model = FusionVLM.from_pretrained(tmp_path / "model").eval()
    states = given.hidden_states(pixels())
    check_logits(model, given, apply_mlp(given.added, PROJECTOR, states[23]))


def test_prompts_are_those_of_the_release(tmp_path: Path) -> None:
    checkpoint = llava_release().write(tmp_path)
    import_checkpoint(str(checkpoint), "llava-1.5", tmp_path / "model")

    processor: Any = Processor.from_pretrained(tmp_path / "model")

    text = processor.chat.expanded_prompt([{"role": "user", "content": "<image>\nHow?"}], 1).text
    assert text.startswith("<s>A chat between a curious user and an artificial")
    assert text.endswith("\nHow? ASSISTANT:")


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        ("llava-1.5", {"mm_projector_type": "mlp3x_gelu"}, "valid here: mlp2x_gelu"),
        ("llava-1.5", {"mm_vision_select_layer": 99}, "99"),
        ("llava-1.5", {"mm_vision_select_feature": "cls_patch"}, "the patches, and nothing else"),
        ("llava-1.5", {"image_aspect_ratio": "anyres"}, "cut into tiles"),
        ("llava-1.5", {"mm_use_im_start_end": True}, "learned tokens around pictures"),
        ("llava-1.5", {"architectures": ["LlavaMptForCausalLM"]}, "valid: LlavaLlamaForCausalLM"),
        ("mmfuser", {}, "MMFuser lists several layers"),
        ("dense-connector", {"mm_dense_connector_type": "none"}, "valid: sti, sci, dci"),
        ("dense-connector", {}, "has no 'mm_dense_connector_type'"),
        ("layer-select-fuse", {"layer_using_strategy": "5"}, "valid: 18, 3-18, 3-18-23"),
        ("igva", {**IGVA, "aggregator_hidden_dim": 64}, "is the paper's, with 32"),
        ("igva", {**IGVA, "vit_aggregate_groups": "oops"}, "lists of layers are expected"),
        ("llava-1.5", {"mm_dense_connector_type": "sti"}, "try --from dense-connector"),
        ("llava-1.5", {"aggregate_by_average": True}, "try --from igva"),
        ("llava-1.5", {"hidden_size": "x"}, "describes no llama"),
        ("llava-1.5", {"mm_vision_tower": "/not/there"}, "hub id or folder by --encoder"),
        ("mmfuser", {"mm_vision_select_layer": "list-7/x"}, "MMFuser lists several layers"),
        ("unknown", {}, "unknown layout 'unknown'; valid: llava-1.5"),
        ("tgif", {}, "TGIF's is layer_selector"),
    ],
)
def test_settings_that_cannot_be_expressed_are_refused(
    layout: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = llava_release(**settings).write(tmp_path)

    with pytest.raises(LayerfuseError, match=message):
        import_checkpoint(str(checkpoint), layout, tmp_path / "model")

    assert not (tmp_path / "model").exists()


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("code ran",)


def spoil_cut(checkpoint: Path) -> None:
    file = checkpoint / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def spoil_overlap(checkpoint: Path) -> None:
    first = checkpoint / "model-00001-of-00002.safetensors"
    (checkpoint / "model-extra.safetensors").write_bytes(first.read_bytes())


def spoil_missing_shard(checkpoint: Path) -> None:
    (checkpoint / "model-00002-of-00002.safetensors").unlink()


def spoil_named_shard(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "elsewhere.safetensors"
    index.write_text(json.dumps(content))


def spoil_code(checkpoint: Path) -> None:
    for file in checkpoint.glob("model*"):
        file.unlink()
    torch.save({"model.mm_projector.0.weight": Evil()}, checkpoint / "pytorch_model.bin")


def spoil_empty(checkpoint: Path) -> None:
    for file in checkpoint.glob("model*"):
        file.unlink()


def spoil_number(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "model-00002-of-00002.safetensors").unlink()


def spoil_index(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def spoil_pointer(checkpoint: Path) -> None:
    for file in checkpoint.glob("model*"):
        file.unlink()
    (checkpoint / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")


def spoil_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[1]")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_cut, "is it cut off"),
        (spoil_overlap, "the shards overlap"),
        (spoil_missing_shard, "lacks the shard model-00002-of-00002.safetensors"),
        (spoil_named_shard, "names shards that are not there: elsewhere.safetensors"),
        (spoil_code, "more than tensors, which could run code and is not loaded"),
        (spoil_number, "lacks the shard model-00002-of-00002.safetensors"),
        (spoil_index, "cannot read .*index.json"),
        (spoil_pointer, "a Git LFS pointer"),
        (spoil_empty, "holds no weights"),
        (spoil_config, "a mapping is expected"),
    ],
)
def test_damaged_files_are_one_clear_error(
    spoil: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = llava_release().write(tmp_path)
    spoil(checkpoint)

    with pytest.raises(LayerfuseError, match=message):
        import_checkpoint(str(checkpoint), "llava-1.5", tmp_path / "model")

    assert not (tmp_path / "model").exists()
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.mm_projector.2.weight": None}, "lacks 1 weights of its fusion, such as model.mm_"),
        ({"model.mm_projector.7.weight": releases.random(2)}, "1 tensors of .* have no place"),
        ({"model.mm_projector.0.weight": releases.random(32, 48)}, r"is \[32, 48\]; with this"),
        ({"model.layers.99.mlp.up_proj.weight": releases.random(2)}, "has no place in an LLM as"),
        ({"model.vision_tower.vision_tower.odd": releases.random(2)}, "weights are missing"),
    ],
)
def test_a_partial_load_is_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    given = llava_release()
    for name, tensor in change.items():
        if tensor is None:
            del given.added[name]
        else:
            given.added[name] = tensor
    checkpoint = given.write(tmp_path)

    with pytest.raises(LayerfuseError, match=message):
        import_checkpoint(str(checkpoint), "llava-1.5", tmp_path / "model")

    assert not (tmp_path / "model").exists()


def test_what_is_elsewhere_must_be_given_and_nothing_more(tmp_path: Path) -> None:
    whole = llava_release().write(tmp_path)
    alone = llava_release().write(tmp_path / "alone", whole=False)
    with pytest.raises(LayerfuseError, match="give that by --base"):
        import_checkpoint(str(alone), "llava-1.5", tmp_path / "model")
    with pytest.raises(LayerfuseError, match="leave --base out"):
        import_checkpoint(
            str(whole), "llava-1.5", tmp_path / "model", Elsewhere(base=str(tmp_path / "llm"))
        )
    with pytest.raises(LayerfuseError, match="leave --sentence-encoder out"):
        import_checkpoint(
            str(whole), "llava-1.5", tmp_path / "model", Elsewhere(sentence_encoder="x")
        )
    save_stock(tmp_path / "stock")
    with pytest.raises(LayerfuseError, match="leave --encoder out"):
        import_checkpoint(
            str(tmp_path / "stock"), "llava-hf", tmp_path / "model", Elsewhere(encoder="x")
        )
    with pytest.raises(LayerfuseError, match="is there already"):
        import_checkpoint(str(whole), "llava-1.5", whole)


def test_another_llm_than_that_of_the_projector_is_refused(tmp_path: Path) -> None:
    checkpoint = llava_release().write(tmp_path, whole=False)
    releases.llm(5).save_pretrained(tmp_path / "deeper")
    tiny.tokenizer().save_pretrained(tmp_path / "deeper")

    with pytest.raises(LayerfuseError, match="its num_hidden_layers is 5, and was 2"):
        import_checkpoint(
            str(checkpoint),
            "llava-1.5",
            tmp_path / "model",
            Elsewhere(base=str(tmp_path / "deeper")),
        )


def test_the_same_tensor_in_two_files_is_refused_whatever_its_prefix(tmp_path: Path) -> None:
    given = llava_release()
    checkpoint = given.write(tmp_path, whole=False)
    prefixed = {f"base_model.model.{name}": value for name, value in given.added.items()}
    torch.save(prefixed, checkpoint / "non_lora_trainables.bin")

    with pytest.raises(LayerfuseError, match=r"both hold 'model\.mm_projector\.0\.weight'"):
        import_checkpoint(
            str(checkpoint), "llava-1.5", tmp_path / "model", Elsewhere(base=str(tmp_path / "llm"))
        )


def test_files_beside_a_whole_model_are_reported(tmp_path: Path) -> None:
    given = llava_release()
    checkpoint = given.write(tmp_path)
    torch.save(given.added, checkpoint / "mm_projector.bin")

    report = import_checkpoint(str(checkpoint), "llava-1.5", tmp_path / "model")

    assert ["mm_projector.bin"] in report.ignored.values()


def test_a_damaged_adapter_is_one_clear_error(tmp_path: Path) -> None:
    given = llava_release()
    checkpoint = given.write(tmp_path, whole=False)
    (checkpoint / "mm_projector.bin").rename(checkpoint / "non_lora_trainables.bin")
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": None}
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"anything": Evil()}, checkpoint / "adapter_model.bin")

    with pytest.raises(LayerfuseError, match="cannot be put on the LLM"):
        import_checkpoint(
            str(checkpoint), "llava-1.5", tmp_path / "model", Elsewhere(base=str(tmp_path / "llm"))
        )


def test_a_sentence_encoder_of_another_machine_has_to_be_given(tmp_path: Path) -> None:
    torch.manual_seed(1)
    added = releases.mlp(PROJECTOR, 2 * WIDTH)
    for name, tensor in Aggregator(4, 12).state_dict().items():
        added[f"model.vision_aggregator.{name}"] = tensor
    settings = {**IGVA, "sentence_embedder": "/data/model_weights/all-mpnet-base-v2"}
    checkpoint = release(settings, added).write(tmp_path)

    with pytest.raises(LayerfuseError, match="a folder by --sentence-encoder"):
        import_checkpoint(str(checkpoint), "igva", tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("next", "cuts each picture into tiles"),
        ("strange", "1 weights that a llava has not"),
        ("overlap", "the shards overlap"),
        ("token", "image_token_index of .* is 9"),
    ],
)
def test_stock_models_are_checked_as_the_others_are(
    change: str, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "stock"
    save_stock(folder, next_generation=change == "next")
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    if change == "strange":
        weights["model.strange"] = torch.ones(2)
        safetensors.torch.save_file(weights, file, {"format": "pt"})
    if change == "overlap":
        first = dict(list(weights.items())[:3])
        safetensors.torch.save_file(first, folder / "model-extra.safetensors", {"format": "pt"})
    if change == "token":
        settings = json.loads((folder / "config.json").read_text())
        settings["image_token_index"] = 9
        (folder / "config.json").write_text(json.dumps(settings))

    with pytest.raises(LayerfuseError, match=message):
        import_checkpoint(str(folder), "llava-hf", tmp_path / "model")

    assert not (tmp_path / "model").exists()


def test_the_command_line_says_what_became_of_the_tensors(tmp_path: Path) -> None:
    checkpoint = llava_release().write(tmp_path)
    output = tmp_path / "model"

    ended = CliRunner().invoke(
        app, ["import", str(checkpoint), "--from", "llava-1.5", "--output", str(output)]
    )

    assert ended.exit_code == 0, ended.output
    assert "used: 4 tensors of the fusion" in ended.stdout
    assert "ignored: 1 tensors, such as model.layers.0.self_attn.rotary_emb.inv" in ended.stdout
    assert "missing: none" in ended.stdout
    assert (output / "config.json").is_file()
