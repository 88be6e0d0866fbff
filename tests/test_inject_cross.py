"""Gated cross-attention inside a real LLM: formula, visibility, decoding, training."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from layerfuse import FusionVLM
from layerfuse.fusion import Layout, Placed
from layerfuse.fusion.injector import Injector
from tests import naive, tiny

TOKENS, LENGTH, BLOCKS = 16, 60, [1, 4]
SANDWICH = ("gemma2", "gemma3")
MORE_LLMS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 16},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pre": {},
    "pre-mlp": {"mlp": True},
    "post": {"position": "post"},
    "post-mlp": {"position": "post", "mlp": True},
    "parallel": {"position": "parallel"},
    "released": {"released_residual": True},
    "released-mlp": {"released_residual": True, "mlp": True},
}
CLEAN = [name for name in VARIANTS if "released" not in name]
each_variant = pytest.mark.parametrize("variant", VARIANTS)
in_two_families = pytest.mark.parametrize(
    ("variant", "llm"), [(v, "llama") for v in VARIANTS] + [(v, "gemma3") for v in CLEAN]
)
each_clean_variant = pytest.mark.parametrize("variant", CLEAN)


@pytest.fixture(autouse=True)
def _more_llms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, settings in MORE_LLMS.items():
        monkeypatch.setitem(tiny.LLMS, name, settings)


def build(variant: str, llm: str = "llama", open_gates: bool = True, **options: Any) -> FusionVLM:
    """A random model with a large addition in two blocks; norms are random as well."""
    settings = {"placement": BLOCKS, **VARIANTS[variant], **options}
    model = tiny.model("inject_cross", llm=llm, open_gates=False, **settings)
    model.fusion.reset_parameters()
    with torch.no_grad():
        for name, parameter in model.fusion.named_parameters():
            if name.endswith(".gate") and open_gates:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim > 1:
                parameter.mul_(2)
        for name, parameter in model.named_parameters():
            if "norm" in name and "vision_tower" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompts(starts: list[list[int]], length: int = LENGTH) -> dict[str, Tensor]:
    """Random rows with images that start at the given places, and random pixels."""
    ids = torch.randint(4, 300, (len(starts), length))
    for row, places in enumerate(starts):
        for start in places:
            ids[row, start : start + TOKENS] = tiny.IMAGE_ID
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = sum(map(len, starts))
    return inputs | ({"pixel_values": torch.randn(images, 3, 32, 32)} if images else {})


def stock_of(model: FusionVLM, folder: Any) -> Any:
    """The LLM of a model, saved and loaded by transformers alone."""
    model.language_model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def embedded(model: FusionVLM, batch: dict[str, Tensor]) -> Tensor:
    """What the LLM reads: text embeddings with the base layer's tokens at the image positions."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    if "pixel_values" in batch:
        tokens = model.get_image_features(batch["pixel_values"]).pooler_output
        embeds[batch["input_ids"] == tiny.IMAGE_ID] = tokens.flatten(0, 1)
    return embeds


class Record:
    """What goes into each decoder block and what comes out, seen from outside."""

    def __init__(self, model: FusionVLM) -> None:
        self.input: dict[int, Tensor] = {}
        self.keywords: dict[int, dict[str, Any]] = {}
        self.output: dict[int, Tensor] = {}
        for index, block in enumerate(model.get_decoder().layers):  # type: ignore[arg-type]
            block.register_forward_pre_hook(self._before(index), with_kwargs=True, prepend=True)
            block.register_forward_hook(self._after(index))

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            self.input[index] = args[0].clone()
            self.keywords[index] = {k: v for k, v in kwargs.items() if k != "visual"}

        return hook

    def _after(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.output[index] = output.clone()

        return hook


class ByHand:
    """`inject_cross` computed outside the model: one decoder block from the parts of a stock one,
    with the addition of the naive cross-attention."""

    def __init__(self, model: FusionVLM, batch: dict[str, Tensor], sandwich: bool) -> None:
        features = model.encode_images(batch["pixel_values"])
        self.memory = naive.solve(model.fusion, features).memory
        self.weights = naive.weights_of(model.fusion)
        self.heads = model.fusion.config.heads or model.config.text_config.num_attention_heads
        self.masks = (batch["input_ids"] == tiny.IMAGE_ID).tolist()
        self.sandwich = sandwich

    def rows(self, compute: Any, block: int, hidden: Tensor) -> Tensor:
        """`compute` for every row, with the memory of its images."""
        memory, out = iter(self.memory[block]), []
        for state, mask in zip(hidden, self.masks, strict=True):
            images = [next(memory) for _ in range(sum(mask) // TOKENS)]
            out.append(compute(naive.array(state), images, mask))
        return torch.tensor(np.array(out), dtype=hidden.dtype)

    def addition(self, block: int, hidden: Tensor) -> Tensor:
        def row(state: np.ndarray, images: list[np.ndarray], mask: list[bool]) -> np.ndarray:
            return naive.cross_addition(self.weights, block, self.heads, state, images, mask)

        return self.rows(row, block, hidden)

    def branches(self, stock: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
        """SA and MLP of the formula, with the norm that follows them in gemma's blocks."""

        def attention(x: Tensor) -> Tensor:
            y = stock.self_attn(hidden_states=x, **keywords)[0]
            return stock.post_attention_layernorm(y) if self.sandwich else y

        def mlp(x: Tensor) -> Tensor:
            y = stock.mlp(x)
            return stock.post_feedforward_layernorm(y) if self.sandwich else y

        return attention, mlp

    def block(
        self, variant: str, stock: Any, index: int, x: Tensor, keywords: dict[str, Any]
    ) -> Tensor:
        attention, mlp = self.branches(stock, keywords)
        norm_1 = stock.input_layernorm
        sandwich = self.sandwich
        norm_2 = stock.pre_feedforward_layernorm if sandwich else stock.post_attention_layernorm
        position = variant.split("-")[0] if index in self.memory else "none"
        if position == "released":
            u = norm_1(x)
            y = x + attention(u + self.addition(index, u))
            z = norm_2(y)
            return z + mlp(z)
        if position == "pre":
            x = x + self.addition(index, x)
        y = x + attention(norm_1(x))
        if position == "parallel":
            y = y + self.addition(index, norm_1(x))
        if position == "post":
            y = y + self.addition(index, y)
        return y + mlp(norm_2(y))


def by_hand_cases() -> list[tuple[str, str]]:
    llms = [*tiny.LLMS, *MORE_LLMS]
    released = [("released", "llama"), ("released-mlp", "llama"), ("released", "qwen3")]
    return [(variant, llm) for variant in CLEAN for llm in llms] + released


@pytest.mark.parametrize(("variant", "llm"), by_hand_cases())
@torch.no_grad()
def test_every_block_is_its_formula(variant: str, llm: str) -> None:
    """With images from the first token on, so that every position sees one."""
    model = build(variant, llm)
    stock = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    stock.load_state_dict(model.language_model.state_dict())
    batch = prompts([[0, 20], [0]], length=40)
    record = Record(model)
    model(**batch, use_cache=False)
    by_hand = ByHand(model, batch, llm in SANDWICH)
    assert sorted(by_hand.memory) == BLOCKS
    for index, block in enumerate(stock.get_decoder().layers):
        hidden, keywords = record.input[index], record.keywords[index]
        expected = by_hand.block(variant, block, index, hidden, keywords)
        torch.testing.assert_close(record.output[index], expected, atol=1e-5, rtol=1e-5)
        if index in BLOCKS:
            plain = block(hidden, **keywords)
            assert not torch.allclose(record.output[index], plain, atol=1e-2)


@pytest.mark.parametrize("variant", ["pre", "post", "parallel", "released"])
@torch.no_grad()
def test_addition_is_its_formula_in_mixed_rows(variant: str) -> None:
    """Text before, between and after images, a row without, one with two."""
    model = build(variant)
    batch = prompts([[5, 30], [], [44]])
    visual = visual_of(model, batch)
    by_hand = ByHand(model, batch, sandwich=False)
    hidden = torch.randn(3, LENGTH, 32)
    for block in BLOCKS:
        expected = by_hand.addition(block, hidden)
        found = model.fusion.addition(block, hidden, visual)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def visual_of(model: FusionVLM, batch: dict[str, Tensor]) -> Placed:
    visual = model(**batch).visual
    assert visual is not None
    return visual


@pytest.mark.parametrize("llm", ["llama", "qwen3", "gemma3", "smollm3"])
@each_clean_variant
@torch.no_grad()
def test_closed_gates_leave_the_stock_llm(variant: str, llm: str, tmp_path: Any) -> None:
    model = build(variant, llm, open_gates=False)
    batch = prompts([[3, 25], [40], []])
    stock = stock_of(model, tmp_path)
    mask = batch["attention_mask"]
    expected = stock(inputs_embeds=embedded(model, batch), attention_mask=mask).logits
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    opened = build(variant, llm)(**batch).logits
    assert not torch.allclose(opened, expected, atol=1e-2)


@pytest.mark.parametrize("llm", ["llama", "smollm3"])
@torch.no_grad()
def test_released_residual_changes_the_llm_even_with_closed_gates(llm: str, tmp_path: Any) -> None:
    """The residual of the public release is a bug: it is kept here for study."""
    model = build("released", llm, open_gates=False)
    batch = prompts([[3], [40]])
    expected = stock_of(model, tmp_path)(inputs_embeds=embedded(model, batch)).logits
    assert float((model(**batch).logits - expected).abs().max()) > 0.1


MIXED = [[5, 30], [], [44]]  # images 0 and 1 in row 0, image 2 in row 2


def perturbed(batch: dict[str, Tensor], image: int) -> dict[str, Tensor]:
    pixels = batch["pixel_values"].clone()
    pixels[image] += torch.randn_like(pixels[image])
    return {**batch, "pixel_values": pixels}


def changed(before: Tensor, after: Tensor) -> list[list[bool]]:
    """(rows, T): which positions changed at all."""
    return (before != after).any(dim=-1).tolist()


@pytest.mark.parametrize("llm", ["llama", "gemma3"])
@pytest.mark.parametrize("variant", ["pre", "pre-mlp", "post", "parallel"])
@torch.no_grad()
def test_an_image_changes_itself_and_what_follows_it(variant: str, llm: str) -> None:
    """Never a position before it or another row."""
    model = build(variant, llm)
    batch = prompts(MIXED)
    before = model(**batch, use_cache=False).logits
    for image, (row, start) in enumerate([(0, 5), (0, 30), (2, 44)]):
        after = model(**perturbed(batch, image), use_cache=False).logits
        difference = (after - before).abs().amax(dim=-1)
        assert float(difference[row, :start].max()) < 1e-6
        assert float(difference[row, start : start + TOKENS].min()) > 1e-4
        others = [r for r in range(3) if r != row]
        assert float(difference[others].max()) < 1e-6
    assert float((model(**perturbed(batch, 1)).logits - before)[0, 46:].abs().max()) > 1e-4


@each_variant
@torch.no_grad()
def test_cross_attention_sees_each_image_from_its_own_tokens_and_later_text(variant: str) -> None:
    """For the same hidden states, only those additions change whose position sees the image: the
    tokens of a second image do not look at the first one."""
    model = build(variant)
    batch = prompts(MIXED)
    hidden = torch.randn(3, LENGTH, 32)
    visual = visual_of(model, batch)
    own = {0: (0, [*range(5, 30), *range(46, 60)]), 1: (0, [*range(30, 60)])}
    own[2] = (2, [*range(44, 60)])
    for image, (row, positions) in own.items():
        other = visual_of(model, perturbed(batch, image))
        for block in BLOCKS:
            before = model.fusion.addition(block, hidden, visual)
            after = model.fusion.addition(block, hidden, other)
            expected = [[r == row and t in positions for t in range(60)] for r in range(3)]
            assert changed(before, after) == expected
            assert visual.seen is not None
            assert visual.seen[row, :, image % 2].tolist() == expected[row]


@each_variant
@torch.no_grad()
def test_what_sees_no_image_gets_exactly_nothing(variant: str) -> None:
    """Text before an image, and rows without one beside rows with several."""
    model = build(variant)
    batch = prompts(MIXED)
    visual, hidden = visual_of(model, batch), torch.randn(3, LENGTH, 32)
    for block in BLOCKS:
        added = model.fusion.addition(block, hidden, visual)
        assert not added[0, :5].any()
        assert not added[1].any()
        assert not added[2, :44].any()
        assert bool(added[0, 5:].any(dim=-1).all())


@in_two_families
@torch.no_grad()
def test_rows_alone_are_the_rows_of_a_left_padded_batch(variant: str, llm: str) -> None:
    """Several images in a row, rows of text alone; what neighbours have does not matter."""
    model = build(variant, llm)
    batch = prompts([[3, 24], [], [40]])
    lengths, rows = [60, 25, 41], []
    for row, length in enumerate(lengths):
        content = batch["input_ids"][row, :length].clone()
        content = batch["input_ids"][row, 60 - length :] if row == 2 else content
        batch["attention_mask"][row, : 60 - length] = 0
        padding = torch.zeros(60 - length).long()
        batch["input_ids"][row] = torch.cat([padding, content])
        rows.append(content[None].clone())
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    together = model(**batch, position_ids=positions).logits
    pixels = [batch["pixel_values"][:2], None, batch["pixel_values"][2:]]
    for row, length in enumerate(lengths):
        alone = model(input_ids=rows[row], pixel_values=pixels[row]).logits
        torch.testing.assert_close(together[row, -length:], alone[0], atol=3e-5, rtol=1e-4)


DECODE: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
DECODE |= {"return_dict_in_generate": True, "output_logits": True}


def padded() -> dict[str, Tensor]:
    """Left padding, two images, none, one."""
    batch = prompts([[6, 28], [], [33]])
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, :30] = 0
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    return batch


@in_two_families
@torch.no_grad()
def test_decoding_is_one_forward_over_everything(variant: str, llm: str) -> None:
    """With a growing cache, with none, and with a static one."""
    model = build(variant, llm)
    batch = padded()
    cached = model.generate(**batch, **DECODE)
    mask = nn.functional.pad(batch["attention_mask"], (0, 5), value=1)
    whole = model(
        input_ids=cached.sequences,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
        pixel_values=batch["pixel_values"],
    ).logits[:, -6:-1]
    found = {
        "cached": cached,
        "uncached": model.generate(**batch, **DECODE, use_cache=False),
        "static": model.generate(
            **batch, **DECODE, cache_implementation="static", disable_compile=True
        ),
    }
    for name, out in found.items():
        stepwise = torch.stack(out.logits, dim=1)
        torch.testing.assert_close(
            stepwise, whole, atol=3e-5, rtol=1e-4, msg=lambda m, n=name: n + m
        )
    blind = visual_of(model, batch).without_memory()
    without = model(**{k: v for k, v in batch.items() if k != "pixel_values"}, visual=blind).logits
    assert not torch.allclose(without[0, -1], found["cached"].logits[0][0], atol=1e-3)


@torch.no_grad()
def test_decoded_tokens_look_at_the_memory() -> None:
    """The step after the prompt is not what the KV cache alone gives."""
    model = build("post")
    batch = prompts([[6]])
    out = model(**batch, use_cache=True)
    assert out.visual is not None
    token = torch.tensor([[50]])
    cache = copy.deepcopy(out.past_key_values)
    with_memory = model(input_ids=token, past_key_values=cache, visual=out.visual).logits
    alone = model(input_ids=token, past_key_values=out.past_key_values).logits
    assert float((with_memory - alone).abs().max()) > 1e-2


BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
BEAMS |= {"min_new_tokens": 5, "do_sample": False, "output_scores": True}
BEAMS |= {"return_dict_in_generate": True}


@each_variant
@torch.no_grad()
def test_beams_are_those_of_each_row_alone(variant: str) -> None:
    model = build(variant)
    batch = prompts([[2, 21], [], [30]])
    together = model.generate(**batch, **BEAMS)
    pixels = [{"pixel_values": batch["pixel_values"][:2]}, {}, {}]
    pixels[2] = {"pixel_values": batch["pixel_values"][2:]}
    for row in range(3):
        own = {k: batch[k][row : row + 1] for k in ("input_ids", "attention_mask")}
        alone = model.generate(**own, **pixels[row], **BEAMS)
        both = slice(2 * row, 2 * row + 2)
        scores = together.sequences_scores[both]
        torch.testing.assert_close(scores, alone.sequences_scores, atol=2e-5, rtol=1e-4)
        assert torch.equal(together.sequences[both], alone.sequences)


@each_variant
@torch.no_grad()
def test_scores_of_beams_are_those_of_one_forward(variant: str) -> None:
    """Each beam of a row has all images of that row, in their order."""
    model = build(variant)
    batch = prompts([[2, 21], [30]])
    out = model.generate(**batch, **BEAMS)
    images = [batch["pixel_values"][:2], batch["pixel_values"][2:]]
    pixels = torch.cat([images[0], images[0], images[1], images[1]])
    logits = model(input_ids=out.sequences, pixel_values=pixels).logits[:, -6:-1]
    answers = out.sequences[:, -5:, None]
    likelihoods = logits.log_softmax(dim=-1).gather(2, answers).mean(dim=(1, 2))
    torch.testing.assert_close(out.sequences_scores, likelihoods, atol=2e-5, rtol=1e-4)


Gradients = dict[str, Tensor]


def gradients(model: FusionVLM, batches: list[dict[str, Tensor]]) -> Gradients:
    """Gradients of the summed losses: every forward first, then one backward."""
    model.zero_grad()
    losses = [model(**b, labels=b["input_ids"]).loss for b in batches]
    torch.stack(losses).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


@each_variant
def test_gradients_of_several_forwards_and_of_recomputed_blocks(variant: str) -> None:
    """Two forwards before one backward give the sum of the gradients of each alone, with
    activation checkpointing too."""
    model = build(variant).train()
    first, second = prompts([[1, 20], [5]]), prompts([[33]])
    alone = [gradients(model, [first]), gradients(model, [second])]
    total = {name: value + alone[1][name] for name, value in alone[0].items()}
    reached = {n.split(".")[1] for n in total if n.startswith("fusion.")}
    assert reached >= {"projector", "projectors", "attention"}
    assert all(bool(v.any()) for n, v in total.items() if n.startswith("fusion."))
    assert_same(gradients(model, [first, second]), total)
    model.activation_checkpointing_enable()
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert_same(gradients(model, [first]), alone[0])
    assert_same(gradients(model, [second, first]), total)
    model.zero_grad()  # nothing of a backward stays behind
    model.eval()
    with torch.no_grad():
        plain = {k: second[k] for k in ("input_ids", "attention_mask")}
        text = model(**plain).logits
        fresh = build(variant).eval()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(text, fresh(**plain).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
@each_variant
def test_hooks_keep_nothing_after_a_backward(variant: str, checkpointing: bool) -> None:
    """What they hold between the parts of a block would hold a batch and its graph in memory."""
    model = build(variant).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    gradients(model, [prompts([[1, 20], []])])
    injectors: list[Injector] = []
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001 - torch lists them nowhere else
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Injector):
                injectors.append(owner)
    assert len(injectors) >= model.config.text_config.num_hidden_layers
    assert not any(injector.pending or injector.visual for injector in injectors)


@pytest.mark.parametrize("checkpointing", [False, True])
@each_variant
def test_deepcopy_after_a_backward(variant: str, checkpointing: bool) -> None:
    """The copy works, has hooks of its own, and leaves the first model alone."""
    model = build(variant).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = prompts([[1, 20], []])
    gradients(model, [batch])
    twin = copy.deepcopy(model).eval()
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(twin(**batch).logits, expected)
        for name, parameter in twin.fusion.named_parameters():
            if name.endswith("output.weight"):  # read by the hooks alone
                parameter.zero_()
        assert not torch.allclose(twin(**batch).logits, expected, atol=1e-2)
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("variant", ["post-mlp", "parallel", "released"])
@torch.no_grad()
def test_compiles_without_graph_breaks(variant: str) -> None:
    """`pre` is compiled with the other strategies. Each block of the LLM is traced anew: two."""
    torch.compiler.reset()  # other graphs count against the limit of recompilations
    model = build(variant, llm_blocks=2, placement=[0, 1])
    batch = prompts([[1], [5]])
    expected = model(**batch, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected)


@each_variant
@torch.no_grad()
def test_another_number_of_rows_is_refused(variant: str) -> None:
    """Keys of one row must not be broadcast over two."""
    model = build(variant)
    batch = prompts([[4]])
    visual = visual_of(model, batch)
    message = "the visual memory has 1 rows and the LLM's input 2"
    with pytest.raises(ValueError, match=message):
        model.fusion.addition(1, torch.randn(2, LENGTH, 32), visual)
    with pytest.raises(ValueError, match=message):
        model(input_ids=batch["input_ids"].repeat(2, 1)[:, -1:], visual=visual.decoding())


@torch.no_grad()
def test_seen_images_of_a_prompt() -> None:
    """The table of the model is that of the rows walked token by token."""
    model = build("pre")
    batch = prompts(MIXED)
    mask = batch["input_ids"] == tiny.IMAGE_ID
    seen = visual_of(model, batch).seen
    layout = Layout.of(mask, images=sum(map(len, MIXED)), tokens_per_image=TOKENS)
    assert torch.equal(seen, layout.seen_images())
    for row, own in zip(seen.tolist(), mask.tolist(), strict=True):
        assert [{i for i in range(2) if v[i]} for v in row] == naive.visible(own, TOKENS)


@pytest.mark.parametrize("variant", ["pre", "post", "parallel", "released"])
@torch.no_grad()
def test_two_threads_do_not_mix_their_images(variant: str) -> None:
    """One model answers several questions at once, as on a web page."""
    model = build(variant)
    batches = [prompts([[5], [20]]) for _ in range(2)]
    expected = [model(**batch).logits for batch in batches]

    def ask(k: int) -> bool:
        return torch.allclose(model(**batches[k % 2]).logits, expected[k % 2], atol=1e-5)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(ask, range(60)))
