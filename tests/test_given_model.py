"""`FusionVLM.from_vlm`: more layers for a model that somebody trained, which it is at first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from layerfuse import FusionVLM
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS
from tests import tiny
from tests.random_prompts import prompts
from tests.stock_folders import save_stock, stock

EXACT: dict[str, tuple[Any, dict[str, Any]]] = {
    "single": ([3], {}),
    "concat": ([1, 2, 3, 4], {}),
    "group_mean": ([[1, 2], [4]], {"base": 3}),
    "weighted_sum": ([1, 2], {"base": 3, "beside": "concat"}),
    "deformable": ([1, 2], {"base": 3}),
    "instruction_weighted": ([[1], [2]], {"base": 3}),
    "inject_add": ([1, 2], {"base": 3, "gate": True}),
    "inject_cross": ([1, 2], {"base": 3}),
}
"""layers and options of every strategy that can begin as a given model"""
IMPOSSIBLE = ["token_concat", "text_routed"]


def without_instruction(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stock models take of a batch."""
    return {name: value for name, value in batch.items() if name != "instruction"}


def test_every_strategy_is_listed() -> None:
    """A new strategy must say whether it can begin as a given model."""
    assert {*EXACT, *IMPOSSIBLE} == set(FUSIONS)


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_it_begins_exactly_as_the_given_model(name: str) -> None:
    """In logits, without any tolerance; rows without images too."""
    layers, options = EXACT[name]
    llava = stock()
    model = FusionVLM.from_vlm(llava, layers, {"name": name, **options})
    batch = prompts(model, [1, 2, 0])

    expected = llava(**without_instruction(batch)).logits

    assert float((model(**batch).logits - expected).abs().max()) == 0.0


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"single"}))
def test_what_was_added_learns(name: str) -> None:
    """Each added part gets a gradient at once, or behind a gate that does."""
    layers, options = EXACT[name]
    model = FusionVLM.from_vlm(stock(), layers, {"name": name, **options})
    batch = prompts(model, [1, 2])
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()

    before = {key: value.clone() for key, value in model.fusion.named_parameters()}
    torch.optim.SGD(model.fusion.parameters(), lr=0.1).step()
    model.eval()
    first_projector = before["projector.linear_1.weight"]
    zero_columns = (first_projector == 0).all(dim=0)
    with torch.no_grad():
        after = model.fusion.get_parameter("projector.linear_1.weight")
        columns_moved = bool(after[:, zero_columns].any())
        gates_moved = False
        for key, value in model.fusion.named_parameters():
            if "gate" in key or "gamma_1" in key:
                gates_moved = gates_moved or bool(value.any())
    assert columns_moved or gates_moved


@torch.no_grad()
def test_a_weighted_sum_alone_is_exact_and_says_that_it_cannot_learn() -> None:
    """With all weight on one layer a softmax has no gradient."""
    llava = stock()
    with pytest.warns(UserWarning, match="never be learned"):
        model = FusionVLM.from_vlm(llava, [1, 3, 4], {"name": "weighted_sum"})
    batch = prompts(model, [1, 2])

    assert torch.equal(model(**batch).logits, llava(**batch).logits)


@pytest.mark.parametrize("llm", tiny.LLMS)
@pytest.mark.parametrize("encoder", ["clip", "siglip", "dinov2", "vit"])
@torch.no_grad()
def test_encoders_and_llms_of_every_family(encoder: str, llm: str) -> None:
    """Their own prefix tokens, embeddings and heads."""
    llava = stock(encoder=encoder, llm=llm)
    model = FusionVLM.from_vlm(llava, [1, 3], {"name": "concat"})
    batch = prompts(model, [1, 2])

    torch.testing.assert_close(
        model(**batch).logits,
        llava(**batch).logits,
        atol=1e-5,
        rtol=0,
    )


@torch.no_grad()
def test_negative_and_several_layers() -> None:
    """`vision_feature_layer` counts from the end and may list layers in any order."""
    minus_two = stock(-2)
    several = stock([4, -4, 4])
    from_minus_two = FusionVLM.from_vlm(minus_two, [3], {"name": "single"})
    from_several = FusionVLM.from_vlm(several, [1, 2, 4], {"name": "concat"})
    batch = prompts(from_minus_two, [1, 2])

    assert torch.equal(from_minus_two(**batch).logits, minus_two(**batch).logits)
    torch.testing.assert_close(
        from_several(**batch).logits, several(**batch).logits, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_llava_next_at_the_size_of_its_encoder() -> None:
    """Its projector makes the same tokens of a picture; how it cuts pictures up is left out."""
    llava = stock(next_generation=True)
    model = FusionVLM.from_vlm(llava, [1, 3], {"name": "concat"})
    pixels = prompts(model, [1])["pixel_values"]

    tower = llava.model.vision_tower(pixels, output_hidden_states=True)
    expected = llava.model.multi_modal_projector(tower.hidden_states[3][:, 1:])

    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected)


@torch.no_grad()
def test_the_given_model_stays_as_it_is() -> None:
    """Its LLM is shared: two models can be made of it, and it answers as before."""
    llava = stock()
    first = FusionVLM.from_vlm(llava, [1, 2], {"name": "inject_add", "base": 3, "gate": True})
    second = FusionVLM.from_vlm(llava, [1, 2], {"name": "inject_cross", "base": 3})
    batch = prompts(first, [1, 2])
    expected = llava(**batch).logits
    first.fusion.get_parameter("gates").fill_(1)

    changed = first(**batch).logits

    assert not torch.equal(changed, expected)
    assert torch.equal(second(**batch).logits, expected)
    assert torch.equal(llava(**batch).logits, expected)
    weights = llava.model.language_model.embed_tokens.weight
    assert first.get_input_embeddings().weight.data_ptr() == weights.data_ptr()


@torch.no_grad()
def test_a_trained_model_of_layerfuse_can_be_given() -> None:
    """With what its strategy does folded; its own injectors, had it any, are left behind."""
    trained = tiny.model("concat", layers=[1, 3], normalize="standardize")
    for buffer in trained.fusion.buffers():
        buffer.add_(0.3)
    model = FusionVLM.from_vlm(trained, [1, 2, 3], {"name": "concat"})
    batch = prompts(model, [1, 2])

    torch.testing.assert_close(model(**batch).logits, trained(**batch).logits, atol=1e-5, rtol=0)
    with pytest.raises(LayerfuseError, match="internal direct"):
        FusionVLM.from_vlm(tiny.model("inject_add"), [1], {"name": "single"})


@torch.no_grad()
def test_what_the_given_model_attached_to_its_llm_is_left_behind() -> None:
    """Else the old strategy would take what belongs to the new one."""
    trained = tiny.model("single", layers=[3])
    model = FusionVLM.from_vlm(trained, [1, 2], {"name": "inject_add", "base": 3, "gate": True})
    batch = prompts(model, [1, 2])
    closed = model(**batch).logits
    model.fusion.get_parameter("gates").fill_(1)

    assert torch.equal(closed, trained(**batch).logits)
    assert not torch.equal(model(**batch).logits, closed)


@torch.no_grad()
def test_a_folder_is_as_good_as_a_model(tmp_path: Path) -> None:
    """Of both kinds."""
    llava = stock()
    llava.save_pretrained(tmp_path / "llava")
    trained = tiny.model("single", layers=[3])
    trained.save_pretrained(tmp_path / "trained")

    from_stock = FusionVLM.from_vlm(tmp_path / "llava", [1, 3], {"name": "concat"})
    from_own = FusionVLM.from_vlm(str(tmp_path / "trained"), [1, 3], {"name": "concat"})
    batch = prompts(from_stock, [1, 2])

    assert torch.equal(from_stock(**batch).logits, llava(**batch).logits)
    assert torch.equal(from_own(**batch).logits, trained(**batch).logits)


@torch.no_grad()
def test_it_is_saved_and_loaded_as_any_model(tmp_path: Path) -> None:
    """Nothing of the given model is needed again."""
    llava = stock()
    model = FusionVLM.from_vlm(llava, [1, 3], {"name": "concat"})
    model.save_pretrained(tmp_path / "model")
    loaded = FusionVLM.from_pretrained(tmp_path / "model")
    batch = prompts(model, [1, 2])

    assert torch.equal(loaded(**batch).logits, llava(**batch).logits)


REFUSED: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    ([1, 2], {"name": "concat"}, {}, r"does not put \[3\] before its projector"),
    ([1], {"name": "group_mean", "base": 2}, {}, r"only \[2\]"),
    ([1, 3], {"name": "concat", "projector": "linear"}, {}, "give it `projector: mlp`"),
    ([1, 3], {"name": "concat", "normalize": "layernorm"}, {}, "leave out `normalize`"),
    ([1, 3], {"name": "concat", "token_scale": 2.0}, {}, "leave out `normalize`"),
    ([1], {"name": "inject_add", "base": 3}, {}, "gate: true"),
    ([1], {"name": "inject_cross", "base": 3, "released_residual": True}, {}, "leave it out"),
    ([1, 3], {"name": "weighted_sum", "beside": "add", "base": 3}, {}, "take beside: concat"),
    ([9], {"name": "single"}, {}, "layer 9 does not exist"),
    (
        [3],
        {"name": "single"},
        {"vision_feature_select_strategy": "full"},
        "in front of the patches",
    ),
    ([3], {"name": "single"}, {"projector_hidden_act": "relu"}, "valid: gelu, linear"),
]


@pytest.mark.parametrize(("layers", "fusion", "changes", "reason"), REFUSED)
def test_what_cannot_begin_so_is_refused(
    layers: Any, fusion: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    """With the reason, and what would be valid."""
    with pytest.raises(LayerfuseError, match=reason):
        FusionVLM.from_vlm(stock(**changes), layers, fusion)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_strategies_that_change_every_token_are_refused(name: str) -> None:
    """They name those that do not."""
    with pytest.raises(LayerfuseError, match="cannot begin as a given model"):
        FusionVLM.from_vlm(stock(), [1, 2], {"name": name, "base": 3})


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    """No model, one of another type, one that lacks weights."""
    (tmp_path / "empty").mkdir()
    AutoModel.from_config(tiny.vision_config()).save_pretrained(tmp_path / "encoder")
    stock().save_pretrained(tmp_path / "llava")
    lacking = tmp_path / "lacking"
    stock().save_pretrained(lacking, max_shard_size="100KB")
    shards = sorted(lacking.glob("model-*.safetensors"))
    cut = shards[0].read_bytes()[:200]
    shards[0].write_bytes(cut)

    for folder, reason in (
        ("empty", "no multimodal model can be made"),
        ("nowhere", "no such folder"),
        ("encoder", "its type is 'clip_vision_model'; valid: llava, llava_next, layerfuse"),
        ("lacking", "cannot read the model"),
    ):
        with pytest.raises(LayerfuseError, match=reason):
            FusionVLM.from_vlm(tmp_path / folder, [1], {"name": "single"})
    with pytest.raises(LayerfuseError, match="cannot add layers to a"):
        FusionVLM.from_vlm(tiny.model().language_model, [1], {"name": "single"})


@torch.no_grad()
def test_pooling_closed_answers_and_ends_are_those_of_the_given_model(tmp_path: Path) -> None:
    """All that decides what a trained model of layerfuse answers."""
    trained = tiny.model("single", layers=[3], token_grid=(2, 2))
    trained.close_answers([2, 7, 9, 50])
    trained.generation_config.eos_token_id = [2, 9]
    trained.save_pretrained(tmp_path / "trained")
    model = FusionVLM.from_vlm(tmp_path / "trained", [1, 3], {"name": "concat"})
    ids = torch.randint(4, 300, (1, 20))
    ids[:, 2:6] = tiny.IMAGE_ID
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, tiny.SIZE, tiny.SIZE)}

    model.save_pretrained(tmp_path / "model")
    loaded = FusionVLM.from_pretrained(tmp_path / "model")

    expected = trained(**batch).logits
    for one in (model, loaded):
        assert torch.equal(one(**batch).logits, expected)
        assert one.config.answer_tokens == [2, 7, 9, 50]
        assert one.generation_config.eos_token_id == [2, 9]


def test_tokens_that_a_stock_model_suppresses_stay_suppressed() -> None:
    """The image token joins them."""
    llava = stock()
    llava.generation_config.suppress_tokens = [40, 41]

    model = FusionVLM.from_vlm(llava, [3], {"name": "single"})

    assert model.generation_config.suppress_tokens == [tiny.IMAGE_ID, 40, 41]


def test_all_of_it_is_on_the_device_of_the_given_model() -> None:
    # transformers types `to` for its own classes only
    given: Any = tiny.model("concat")
    model = FusionVLM.from_vlm(given.to("meta"), [1, 3, 4], {"name": "concat"})
    on_devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    assert on_devices == {"meta"}


@pytest.mark.parametrize("token", [-1, 5000])
def test_an_image_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(
        LayerfuseError, match=rf"\(image_token_index\) is {token}, .* valid are 0 to"
    ):
        FusionVLM.from_vlm(stock(image_token_index=token), [1, 3], {"name": "concat"})


def test_a_folder_with_another_file_of_the_same_weights_is_refused(tmp_path: Path) -> None:
    save_stock(tmp_path)
    (tmp_path / "model-extra.safetensors").write_bytes(
        (tmp_path / "model.safetensors").read_bytes()
    )

    with pytest.raises(LayerfuseError, match=r"model-extra.safetensors and model.safetensors both"):
        FusionVLM.from_vlm(tmp_path, [1, 3], {"name": "concat"})
