"""Invariants of FusionVLM, over strategies, LLM families and encoders."""

import copy
import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from layerfuse import Answerer, FusionVLM, Processor
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS
from layerfuse.model.config import configure
from tests import tiny

AXES = (list(FUSIONS), list(tiny.LLMS), ["clip", "siglip", "dinov2_registers"])
PRODUCT = list(itertools.product(*AXES))


def _pairwise() -> list[tuple[str, str, str]]:
    """A small subset of the product that holds every pair of values of two axes."""
    shuffled, chosen = list(PRODUCT), []
    random.Random(0).shuffle(shuffled)
    missing = {(i, c[i], j, c[j]) for c in PRODUCT for i in range(3) for j in range(i)}
    while missing:
        covers = [{(i, c[i], j, c[j]) for i in range(3) for j in range(i)} for c in shuffled]
        best = max(range(len(shuffled)), key=lambda k: len(covers[k] & missing))
        chosen.append(shuffled.pop(best))
        missing -= covers[best]
    return chosen


PAIRWISE = _pairwise()
COMBINATIONS = [
    pytest.param(*c, marks=[] if c in PAIRWISE else [pytest.mark.slow], id="-".join(c))
    for c in PRODUCT
]
everywhere = pytest.mark.parametrize(("strategy", "llm", "encoder"), COMBINATIONS)
each_strategy = pytest.mark.parametrize("strategy", list(FUSIONS))


def prompts(model: FusionVLM, images_per_row: list[int], length: int = 60) -> dict[str, Tensor]:
    """Random rows with that many images each, and random pixels."""
    layers = len(model.config.vision_layers)
    count = model.fusion.num_tokens(model.fusion.config, (4, 4), layers)
    ids = torch.randint(4, 300, (len(images_per_row), length))
    for row, images in enumerate(images_per_row):
        for k in range(images):
            start = 2 + row + k * (count + 3)
            ids[row, start : start + count] = tiny.IMAGE_ID
    pixels = torch.randn(sum(images_per_row), 3, tiny.SIZE, tiny.SIZE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.fusion.reads == "sentence":
        inputs["instruction"] = torch.randn(len(ids), model.fusion.config.sentence_width)
    if len(pixels):
        inputs["pixel_values"] = pixels
    return inputs


def everything(model: FusionVLM, batch: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """Logits of one forward over prompt and answer; the answer is labelled, so that it is known
    not to be the prompt."""
    length = batch["input_ids"].shape[1]
    labels = sequences.masked_fill(torch.arange(sequences.shape[1]) < length, -100)
    visual_inputs = {k: v for k, v in batch.items() if k in ("pixel_values", "instruction")}
    return model(input_ids=sequences, labels=labels, **visual_inputs).logits


def row_of(batch: dict[str, Tensor], row: int, pixels: Tensor | None) -> dict[str, Any]:
    """One row alone: its pixels and its instruction."""
    inputs: dict[str, Any] = {}
    if pixels is not None:
        inputs["pixel_values"] = pixels
    if "instruction" in batch:
        inputs["instruction"] = batch["instruction"][row : row + 1]
    return inputs


@everywhere
@torch.no_grad()
def test_saved_and_loaded_model_is_the_same(
    strategy: str, llm: str, encoder: str, tmp_path: Path
) -> None:
    model = tiny.model(strategy, encoder, llm, normalize="standardize", token_scale=2.0)
    batch = prompts(model, [1, 2])
    features = model.encode_images(batch["pixel_values"])
    model.fusion.calibrate(features, model.embedding_std)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, FusionVLM)
    assert torch.equal(loaded(**batch).logits, expected)
    saved, again = model.state_dict(), loaded.state_dict()
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[k], again[k]) for k in saved)


@everywhere
@torch.no_grad()
def test_decoding_with_cache_gives_the_same_logits(strategy: str, llm: str, encoder: str) -> None:
    """Prefill and single steps equal one forward over everything."""
    model = tiny.model(strategy, encoder, llm)
    batch = prompts(model, [1, 2])
    out = model.generate(
        **batch,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    whole = everything(model, batch, out.sequences)
    stepwise = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(stepwise, whole[:, -7:-1], atol=2e-5, rtol=1e-4)


@each_strategy
@torch.no_grad()
def test_generation_without_cache_gives_the_same_logits(strategy: str) -> None:
    """Guided strategies too are guided by the prompt alone, not by what was generated."""
    model = tiny.model(strategy)
    batch = prompts(model, [1, 0])
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**batch, **options)
    plain = model.generate(**batch, **options, use_cache=False)
    torch.testing.assert_close(
        torch.stack(plain.logits), torch.stack(cached.logits), atol=2e-5, rtol=1e-4
    )


@everywhere
@torch.no_grad()
def test_left_padding_and_neighbours_do_not_matter(strategy: str, llm: str, encoder: str) -> None:
    """Each row alone, without padding, gives the logits that it gives in a padded batch."""
    model = tiny.model(strategy, encoder, llm)
    batch = prompts(model, [2, 0, 1])
    lengths, rows = [60, 25, 41], []
    for row, length in enumerate(lengths):
        batch["attention_mask"][row, : 60 - length] = 0
        content = batch["input_ids"][row].clone()
        batch["input_ids"][row] = torch.cat([torch.zeros(60 - length).long(), content[:length]])
        rows.append(content[None, :length])
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    together = model(**batch, position_ids=positions).logits
    pixels = [batch["pixel_values"][:2], None, batch["pixel_values"][2:]]
    for row, length in enumerate(lengths):
        alone = model(input_ids=rows[row], **row_of(batch, row, pixels[row])).logits
        torch.testing.assert_close(together[row, -length:], alone[0], atol=3e-5, rtol=1e-4)


@everywhere
def test_every_layer_and_parameter_gets_gradient(strategy: str, llm: str, encoder: str) -> None:
    """As built, with closed gates: those open in the first optimizer step. Behind the second gate
    of `deformable` (its self-attention) gradient needs one step more."""
    model = tiny.model(strategy, encoder, llm, open_gates=False).train()
    batch = prompts(model, [1, 2])
    features = model.encode_images(batch.pop("pixel_values"))
    leaves = [x.detach().requires_grad_() for x in features.patches]
    features = replace(
        features, patches=tuple(leaves), summary=tuple(x.detach() for x in features.summary)
    )
    labels = batch["input_ids"].clone()
    labels[:, :50] = -100  # what stands before an answer is the prompt, which a router reads
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3 if strategy == "deformable" else 2):
        optimizer.zero_grad()
        for leaf in leaves:
            leaf.grad = None
        model(**batch, features=features, labels=labels).loss.backward()
        without = [n for n, p in trained_parts(model) if p.grad is None or not bool(p.grad.any())]
        optimizer.step()
    assert not without
    assert all(x.grad is not None and bool(x.grad.any()) for x in leaves)


def trained_parts(model: FusionVLM) -> list[tuple[str, Tensor]]:
    parts = (model.fusion, model.language_model)
    return [pair for part in parts for pair in part.named_parameters()]


@each_strategy
def test_activation_checkpointing_gives_the_same_gradients(strategy: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny.model(strategy).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        batch = prompts(model, [1, 2])
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=1e-6, rtol=1e-5)


@each_strategy
@torch.no_grad()
def test_deepcopy_is_independent(strategy: str) -> None:
    model = tiny.model(strategy)
    batch = prompts(model, [1])
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    for parameter in model.fusion.parameters():
        parameter.zero_()
    assert torch.equal(twin(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)


@each_strategy
@torch.no_grad()
def test_compiles_without_graph_breaks(strategy: str) -> None:
    """The LLM has as few blocks as the strategy allows: each is traced anew."""
    torch.compiler.reset()  # other strategies' graphs count against the limit of recompilations
    blocks = 3 if FUSIONS[strategy][1].kind.startswith("internal") else 1
    model = tiny.model(strategy, llm_blocks=blocks)
    batch = prompts(model, [1, 1])
    expected = model(**batch, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected)


@each_strategy
def test_lora_on_the_llm_leaves_the_fusion_trainable(strategy: str) -> None:
    model = tiny.model(strategy)
    batch = prompts(model, [1])
    with torch.no_grad():
        expected = model(**batch).logits
    adapted = get_peft_model(model.language_model, LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():  # fresh adapters change nothing
        assert torch.equal(model(**batch).logits, expected)
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.fusion.parameters())
    trained = {n for n, p in model.language_model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    adapted.merge_and_unload()
    assert not any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("llm", tiny.LLMS)
@torch.no_grad()
def test_zero_projectors_leave_the_stock_llm(llm: str, tmp_path: Path) -> None:
    """Internal fusion that adds zeros is the LLM itself, and the LLM's own weights stay stock."""
    model = tiny.model("inject_add", llm=llm)
    for parameter in model.fusion.get_submodule("projectors").parameters():
        parameter.zero_()
    batch = prompts(model, [1, 1])
    table = model.get_input_embeddings()
    tokens = model.get_image_features(batch["pixel_values"]).pooler_output
    embedded = table(batch["input_ids"])
    embedded[batch["input_ids"] == tiny.IMAGE_ID] = tokens.flatten(0, 1)
    model.language_model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = stock(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
def test_injection_happens_at_image_positions_before_its_block() -> None:
    """Against a hand-written forward of the llama blocks."""
    model = tiny.model("inject_add", placement=[2, 4])
    batch = prompts(model, [1, 2])
    seen: dict[int, Tensor] = {}
    decoder = model.language_model.get_decoder()
    for index, block in enumerate(decoder.layers):  # hooks run after the model's own
        block.register_forward_pre_hook(
            lambda module, args, index=index: seen.__setitem__(index, args[0])
        )
        block.register_forward_hook(
            lambda module, args, out, index=index: seen.__setitem__(100 + index, out)
        )
    model(**batch)
    visual = model.fuse(model.encode_images(batch["pixel_values"]))
    image = batch["input_ids"] == tiny.IMAGE_ID
    for block in range(1, 6):
        added = seen[block] - seen[100 + block - 1]
        assert torch.equal(added[~image], torch.zeros_like(added[~image]))
        expected = visual.memory.get(block)
        expected = torch.zeros_like(added[image]) if expected is None else expected.flatten(0, 1)
        torch.testing.assert_close(added[image], expected, atol=1e-5, rtol=1e-5)
    assert list(visual.memory) == [2, 4]


def stock_llava(layers: list[int]) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tiny.vision_config("clip"),
            text_config=tiny.text_config("llama"),
            image_token_index=tiny.IMAGE_ID,
            vision_feature_layer=layers,
            vision_feature_select_strategy="default",
        )
    ).eval()


@pytest.mark.parametrize("layers", [[3], [1, 4], [4, 2, 1]])
@torch.no_grad()
def test_concat_is_stock_llava(layers: list[int]) -> None:
    """Same weights, difference 0.0 in logits and in the loss."""
    stock = stock_llava(layers)
    for parameter in stock.parameters():
        parameter.mul_(3 if parameter.ndim > 1 else 1)
    model = tiny.model("concat", layers=layers)
    weights, stock_weights = {}, stock.state_dict()
    for name in model.state_dict():
        source = name.replace("vision_tower.tower.", "model.vision_tower.")
        source = source.replace("fusion.projector.", "model.multi_modal_projector.")
        source = source.replace("language_model.lm_head", "lm_head")
        source = source.replace("language_model.model.", "model.language_model.")
        weights[name] = stock_weights.get(
            source, torch.ones(())
        )  # the scale is not in LLaVA: it is 1
    model.load_state_dict(weights)
    batch = prompts(model, [1, 2])
    expected = stock(**batch, labels=batch["input_ids"])
    output = model(**batch, labels=batch["input_ids"])
    assert float((output.logits - expected.logits).abs().max()) == 0.0
    assert float(output.loss - expected.loss) == 0.0


@torch.no_grad()
def test_loss_at_labelled_positions_is_the_whole_loss() -> None:
    """Training computes logits only where a label is; the loss and its scale stay the same."""
    model = tiny.model("concat")
    batch = prompts(model, [1, 2])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 30:33] = batch["input_ids"][0, 30:33]
    labels[1, 50] = batch["input_ids"][1, 50]
    expected = model(**batch, labels=labels)
    sparse = model.train()(**batch, labels=labels)
    assert sparse.logits is None
    torch.testing.assert_close(sparse.loss, expected.loss)
    halved = model(**batch, labels=labels, num_items_in_batch=8).loss
    torch.testing.assert_close(halved, expected.loss / 2)


@each_strategy
@torch.no_grad()
def test_cached_features_are_the_same_as_pixels(strategy: str) -> None:
    model = tiny.model(strategy)
    batch = prompts(model, [1, 2])
    expected = model(**batch).logits
    features = model.encode_images(batch.pop("pixel_values"))
    assert torch.equal(model(**batch, features=features).logits, expected)


@each_strategy
@torch.no_grad()
def test_beams_keep_each_rows_images(strategy: str) -> None:
    """Several rows with several images in beam search equal each row alone."""
    model = tiny.model(strategy)
    batch = prompts(model, [2, 0, 1])
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    together = model.generate(**batch, **options)
    pixels = [batch["pixel_values"][:2], None, batch["pixel_values"][2:]]
    for row in range(3):
        ids = batch["input_ids"][row : row + 1]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
        alone = model.generate(**inputs, **row_of(batch, row, pixels[row]))
        assert together[row].tolist()[: alone.shape[1]] == alone[0].tolist()
    features = model.encode_images(batch.pop("pixel_values"))
    assert torch.equal(model.generate(**batch, features=features, **options), together)


@each_strategy
@torch.no_grad()
def test_static_cache_decodes_the_same(strategy: str) -> None:
    model = tiny.model(strategy)
    batch = prompts(model, [1, 1])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    dynamic = model.generate(**batch, **options)
    static = model.generate(**batch, cache_implementation="static", **options)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(
        torch.stack(static.logits), torch.stack(dynamic.logits), atol=2e-5, rtol=1e-4
    )


def test_wrong_number_of_image_tokens() -> None:
    model = tiny.model("concat")
    batch = prompts(model, [1, 1])
    pixels = batch.pop("pixel_values")
    with pytest.raises(LayerfuseError, match=r"32 image tokens in the text, but 1 images of 16"):
        model(**batch, pixel_values=pixels[:1])
    batch["input_ids"][0, 3], batch["input_ids"][1, 40] = 9, tiny.IMAGE_ID  # same sum, no images
    with pytest.raises(LayerfuseError, match=r"by row: \[15, 17\]"):
        model(**batch, pixel_values=pixels)


def saved_parts(folder: Path) -> tuple[str, str]:
    """An encoder and an LLM as ordinary local folders."""
    encoder, llm = folder / "encoder", folder / "llm"
    from transformers import AutoModel

    vision: PreTrainedModel = AutoModel.from_config(tiny.vision_config("dinov2"))
    vision.save_pretrained(encoder)
    tiny.image_processor().save_pretrained(encoder)
    AutoModelForCausalLM.from_config(tiny.text_config("llama")).save_pretrained(llm)
    tiny.tokenizer(image=False).save_pretrained(llm)
    return str(encoder), str(llm)


@torch.no_grad()
def test_compose_keeps_pretrained_weights_and_adds_the_image_token(tmp_path: Path) -> None:
    encoder, llm = saved_parts(tmp_path)
    fusion = {"name": "concat"}
    model = FusionVLM.compose(encoder=encoder, llm=llm, layers=[2, 3], fusion=fusion)
    stock = AutoModelForCausalLM.from_pretrained(llm)
    weights = model.language_model.state_dict()
    vocabulary = stock.config.vocab_size
    for name, value in stock.state_dict().items():
        assert torch.equal(weights[name][: len(value)], value), name
    assert model.config.image_token_id == 260  # "<image>" is new in this tokenizer
    assert model.get_input_embeddings().weight.shape[0] == vocabulary
    from transformers import AutoModel

    tower = AutoModel.from_pretrained(encoder).state_dict()
    for name, value in model.vision_tower.tower.state_dict().items():
        assert torch.equal(value, tower[name]), name


@torch.no_grad()
def test_a_full_vocabulary_grows_by_a_row_that_is_never_likeliest(tmp_path: Path) -> None:
    _, llm = saved_parts(tmp_path)
    small = AutoModelForCausalLM.from_config(tiny.text_config("llama", vocab_size=260))
    small.save_pretrained(llm)
    model = FusionVLM.compose(
        encoder=tiny.vision_config(), llm=llm, layers=[2], fusion={"name": "single"}
    )
    table = model.get_input_embeddings().weight
    assert table.shape[0] == 261
    torch.testing.assert_close(table[260], table[:260].mean(dim=0))
    ids = torch.randint(4, 260, (3, 9))
    assert int(model(input_ids=ids).logits.argmax(dim=-1).max()) < 260


@torch.no_grad()
def test_ask_and_reload_with_auto_classes(tmp_path: Path) -> None:
    encoder, llm = saved_parts(tmp_path)
    model = FusionVLM.compose(encoder=encoder, llm=llm, layers=[2, 3], fusion={"name": "concat"})
    from layerfuse.model.pretrained import compose_processor

    processor = compose_processor(encoder, llm, model.config, chat_template=None, image_token=None)
    from PIL import Image

    picture = Image.new("RGB", (40, 50), "red")
    answerer = Answerer(model.eval(), processor)
    file = tmp_path / "picture.png"
    picture.save(file)
    asked = answerer.ask([picture], "What colour?", max_new_tokens=5)
    assert answerer.ask([file], "What colour?", max_new_tokens=5) == asked
    for images in ([picture, picture], []):
        assert isinstance(answerer.ask(images, "What colour?", max_new_tokens=5), str)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again: Any = AutoModelForImageTextToText.from_pretrained(folder)
    loaded = AutoProcessor.from_pretrained(folder)
    assert isinstance(loaded, Processor)
    assert Answerer(again, loaded).ask([picture], "What colour?", max_new_tokens=5) == asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [9]}, "layer 9 does not exist: the encoder has 4 blocks"),
        ({"layers": "deep"}, "cannot read 'deep'"),
        ({"fusion": {"name": "mixer"}}, "unknown fusion strategy"),
        ({"fusion": {"name": "concat", "heads": 2}}, "valid options"),
        ({"encoder": tiny.text_config("llama")}, "not an encoder with patch tokens"),
        ({"layers": "1-4", "fusion": {"name": "inject_add", "placement": [7] * 4}}, "6 blocks"),
        ({"image_token_id": None}, "`image_token_id` must be given"),
    ],
)
def test_bad_compositions_fail_before_weights_load(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were made")

    monkeypatch.setattr("layerfuse.model.vlm.load_llm", never)
    monkeypatch.setattr("layerfuse.model.vlm.Encoder.from_config", never)
    good: dict[str, Any] = {"encoder": tiny.vision_config(), "llm": tiny.text_config()}
    good |= {"layers": [2], "fusion": {"name": "concat"}, "image_token_id": tiny.IMAGE_ID}
    with pytest.raises(LayerfuseError, match=message):
        FusionVLM.compose(**{**good, **changes})


def test_the_saved_configuration_is_resolved() -> None:
    config = configure(
        tiny.vision_config(), tiny.text_config(), "1,-2", {"name": "group_mean", "base": -1}
    )
    assert config.vision_layers == [1, 3]
    assert config.fusion is not None
    assert config.fusion["base"] == 4
    assert config.vision_config.num_hidden_layers == 4


def test_an_llm_that_is_more_or_other_than_a_decoder_is_refused() -> None:
    from transformers import Gemma3Config, GPT2Config

    both = Gemma3Config(text_config=tiny.text_config("gemma3").to_dict())
    parts: dict[str, Any] = {"encoder": tiny.vision_config(), "layers": [2]}
    parts |= {"fusion": {"name": "single"}, "image_token_id": tiny.IMAGE_ID}
    with pytest.raises(LayerfuseError, match="is a multimodal model"):
        FusionVLM.compose(llm=both, **parts)
    other = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300)
    with pytest.raises(LayerfuseError, match=r"keeps its blocks elsewhere than in `model\.layers`"):
        FusionVLM.compose(llm=other, **parts)
