"""Small random checkpoints as the code of the papers writes them, and what they compute.

Everything is written from the names and formulas of the releases, and nothing from the tables of
layerfuse.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlamaForCausalLM, SiglipVisionModel

from tests import tiny

WIDTH = 32
"""of the encoder: 16 heads of MMFuser's block and 4 of IGVA's divide it"""
LLM_WIDTH = 32
GRID = 4
HEADS = 16
LLM_HEADS = 4
POINTS = 4
MLP_SETTINGS = {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": WIDTH}
Tensors = dict[str, Tensor]
HiddenStates = tuple[Tensor, ...]


def encoder(depth: int = 24, name: str = "clip") -> Any:
    """A tower with every hidden state of a published depth."""
    torch.manual_seed(7)
    config: Any = tiny.vision_config(
        name, hidden_size=WIDTH, num_attention_heads=4, num_hidden_layers=depth
    )
    tower_class: Any = CLIPVisionModel if name == "clip" else SiglipVisionModel
    return tower_class(config).eval()


def llm(depth: int) -> Any:
    """An LLM with large weights, so that a wrong token shows in its logits."""
    torch.manual_seed(8)
    config: Any = tiny.text_config(num_hidden_layers=depth, num_key_value_heads=4)
    llm_class: Any = LlamaForCausalLM
    model = llm_class(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return model


@dataclass
class Release:
    """A released checkpoint in parts."""

    tower: Any
    language_model: Any
    settings: dict[str, Any]
    added: Tensors

    def write(self, folder: Path, *, whole: bool = True) -> Path:
        """Write the encoder beside a checkpoint of the LLM and what was added to it.

        Args:
            folder: gets `checkpoint`, `encoder` and `llm`.
            whole: two shards of a whole model; else mm_projector.bin alone.
        """
        self.tower.save_pretrained(folder / "encoder")
        tiny.image_processor().save_pretrained(folder / "encoder")
        self.language_model.save_pretrained(folder / "llm")
        tiny.tokenizer(chat_template=None).save_pretrained(folder / "llm")
        checkpoint = folder / "checkpoint"
        tiny.tokenizer(chat_template=None).save_pretrained(checkpoint)
        settings = {
            **self.language_model.config.to_dict(),
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "mm_vision_tower": str(folder / "encoder"),
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            **self.settings,
        }
        (checkpoint / "config.json").write_text(json.dumps(settings))
        added = {name: tensor.contiguous() for name, tensor in self.added.items()}
        if whole:
            of_llm = {**self.language_model.state_dict()}
            of_llm["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
            save_shards(checkpoint, [of_llm, added])
        else:
            torch.save(added, checkpoint / "mm_projector.bin")
        return checkpoint

    @torch.no_grad()
    def hidden_states(self, pixels: Tensor, *, drop_first: bool = True) -> HiddenStates:
        """The patch tokens of every layer (B, N, D), 0 being the embeddings."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        return tuple(state[:, 1:] if drop_first else state for state in states)


def save_shards(folder: Path, shards: list[Tensors]) -> None:
    """Write safetensors as large models have them, with their index."""
    places: dict[str, str] = {}
    untyped: Any = safetensors.torch
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        copies = {key: tensor.clone().contiguous() for key, tensor in shard.items()}
        untyped.save_file(copies, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random(*shape: int) -> Tensor:
    """A tensor that nothing initialises so."""
    return torch.randn(*shape) * 0.3


def linear(name: str, inputs: int, outputs: int) -> Tensors:
    """A Linear's tensors."""
    return {f"{name}.weight": random(outputs, inputs), f"{name}.bias": random(outputs)}


def mlp(name: str, inputs: int = WIDTH, first: int = 0) -> Tensors:
    """LLaVA's projector, an `nn.Sequential`."""
    return {
        **linear(f"{name}.{first}", inputs, LLM_WIDTH),
        **linear(f"{name}.{first + 2}", LLM_WIDTH, LLM_WIDTH),
    }


def apply_linear(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def apply_mlp(tensors: Mapping[str, Tensor], name: str, x: Tensor, first: int = 0) -> Tensor:
    hidden = F.gelu(apply_linear(tensors, f"{name}.{first}", x))
    return apply_linear(tensors, f"{name}.{first + 2}", hidden)


def norm(name: str, width: int = WIDTH) -> Tensors:
    return {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}


def apply_norm(tensors: Mapping[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def fuser(name: str, levels: int) -> Tensors:
    """MMFuser's block, with gates that are open."""
    tensors: Tensors = {f"{name}.gamma1": random(WIDTH), f"{name}.gamma2": random(WIDTH)}
    for norm_name in ("query_norm", "feat_norm", "norm1"):
        tensors.update(norm(f"{name}.{norm_name}"))
    for part, of_part in (("cross_attn", levels), ("self_attn", 1)):
        points = HEADS * of_part * POINTS
        tensors.update(linear(f"{name}.{part}.sampling_offsets", WIDTH, 2 * points))
        tensors.update(linear(f"{name}.{part}.attention_weights", WIDTH, points))
        tensors.update(linear(f"{name}.{part}.value_proj", WIDTH, WIDTH))
        tensors.update(linear(f"{name}.{part}.output_proj", WIDTH, WIDTH))
    return tensors


def apply_deformable(
    tensors: Mapping[str, Tensor], name: str, query: Tensor, values: list[Tensor]
) -> Tensor:
    """Multi-scale deformable attention by `grid_sample`, all levels on one square grid."""
    batch, count, _ = query.shape
    levels = len(values)
    offsets = apply_linear(tensors, f"{name}.sampling_offsets", query)
    offsets = offsets.view(batch, count, HEADS, levels, POINTS, 2) / GRID
    weights = apply_linear(tensors, f"{name}.attention_weights", query)
    weights = weights.view(batch, count, HEADS, levels * POINTS).softmax(-1)
    weights = weights.view(batch, count, HEADS, levels, POINTS)
    centres = (torch.arange(GRID) + 0.5) / GRID
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    reference = torch.stack([columns.flatten(), rows.flatten()], dim=-1)
    places = reference.view(1, count, 1, 1, 1, 2) + offsets
    mixed = torch.zeros(batch, count, HEADS, WIDTH // HEADS)
    for level, value in enumerate(values):
        projected = apply_linear(tensors, f"{name}.value_proj", value)
        by_head = projected.view(batch, GRID, GRID, HEADS, WIDTH // HEADS)
        for head in range(HEADS):
            field = by_head[:, :, :, head].permute(0, 3, 1, 2)
            at = 2 * places[:, :, head, level] - 1
            sampled = F.grid_sample(field, at, align_corners=False)
            amount = weights[:, :, head, level].unsqueeze(1)
            mixed[:, :, head] += (sampled * amount).sum(-1).permute(0, 2, 1)
    return apply_linear(tensors, f"{name}.output_proj", mixed.flatten(2))


def apply_fuser(
    tensors: Mapping[str, Tensor], name: str, layers: list[Tensor], base: Tensor
) -> Tensor:
    query = apply_norm(tensors, f"{name}.query_norm", base, 1e-6)
    values = [apply_norm(tensors, f"{name}.feat_norm", layer, 1e-6) for layer in layers]
    read = apply_deformable(tensors, f"{name}.cross_attn", query, values)
    normed = apply_norm(tensors, f"{name}.norm1", read, 1e-6)
    around = apply_deformable(tensors, f"{name}.self_attn", normed, [normed])
    return base + tensors[f"{name}.gamma1"] * (read + tensors[f"{name}.gamma2"] * around)


class Aggregator(nn.Module):
    """IGVA's weight allocator, with the module names of its release."""

    def __init__(self, groups: int, sentence_width: int) -> None:
        super().__init__()
        self.sentence_proj = nn.Linear(sentence_width, WIDTH)
        self.cls_proj = nn.Linear(WIDTH, WIDTH)
        self.transformers = nn.ModuleList(AggregatorBlock() for _ in range(4))
        self.linear = nn.Linear(WIDTH, groups)

    def forward(self, cls_features: Tensor, sentence: Tensor) -> Tensor:
        query = self.sentence_proj(sentence)
        groups = self.cls_proj(cls_features)
        for block in self.transformers:
            query = block(query, groups)
        return self.linear(query).softmax(-1)


class AggregatorBlock(nn.Module):
    """A block of it."""

    def __init__(self) -> None:
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)

    def forward(self, query: Tensor, groups: Tensor) -> Tensor:
        attended, _ = self.cross_attention(query.unsqueeze(1), groups, groups)
        query = self.norm1(attended.squeeze(1) + query)
        return self.norm2(self.ffn(query) + query)


@torch.no_grad()
def logits_of(
    language_model: Any,
    input_ids: Tensor,
    visual: Tensor,
    added: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """The logits of a stock LLM whose image tokens are replaced, with additions before blocks.

    Args:
        language_model: of transformers.
        input_ids: (B, T)
        visual: (B, N, H) in the place of the image tokens.
        added: by the block, (B, N, H) that are added at these places before it.
    """
    places = input_ids == tiny.IMAGE_ID
    embedded = language_model.get_input_embeddings()(input_ids)
    embedded[places] = visual.flatten(0, 1)

    def adding(addition: Tensor) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            hidden[places] += addition.flatten(0, 1)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    handles: list[Any] = []
    for block, addition in (added or {}).items():
        module = language_model.model.layers[block]
        handles.append(module.register_forward_pre_hook(adding(addition), with_kwargs=True))
    try:
        return language_model(inputs_embeds=embedded).logits
    finally:
        for handle in handles:
            handle.remove()


def apply_cross(
    tensors: Mapping[str, Tensor], name: str, x: Tensor, memory: Tensor, sees: Tensor
) -> Tensor:
    """The fusion study's cross-attention, without bias and rotation.

    Args:
        tensors: of the checkpoint.
        name: of the attention.
        x: (B, T, H), what asks.
        memory: (B, N, H), a layer of the encoder in the LLM's width.
        sees: (B, T), the positions that see the picture; at the others it adds nothing.
    """
    batch, length, width = x.shape
    head_width = width // LLM_HEADS

    def by_head(part: str, of: Tensor) -> Tensor:
        projected = F.linear(of, tensors[f"{name}.{part}.weight"])
        return projected.view(batch, -1, LLM_HEADS, head_width)

    query, key, value = by_head("q_proj", x), by_head("k_proj", memory), by_head("v_proj", memory)
    scores = torch.einsum("bthd,bnhd->bhtn", query, key) / head_width**0.5
    read = torch.einsum("bhtn,bnhd->bthd", scores.softmax(-1), value)
    read = F.linear(read.reshape(batch, length, width), tensors[f"{name}.o_proj.weight"])
    return read * sees.unsqueeze(-1)


@torch.no_grad()
def logits_with_cross(
    language_model: Any,
    input_ids: Tensor,
    visual: Tensor,
    tensors: Mapping[str, Tensor],
    memory: Mapping[int, Tensor],
) -> Tensor:
    """The logits of a stock LLM whose blocks are those of the fusion study's I_M.

    With x the input of such a block and N, N' its norms:
    u = N(x), u' = u + tanh(a) CA(u, V), u'' = u' + tanh(b) MLP_new(u'),
    y = x + SA(u''), z = N'(y), and z + MLP(z) is its output. Before the picture nothing is added.

    Args:
        language_model: of transformers, built as llama.
        input_ids: (B, T), one picture a row.
        visual: (B, N, H) in the place of the image tokens.
        tensors: of the checkpoint.
        memory: V by the block, (B, N, H).
    """
    places = input_ids == tiny.IMAGE_ID
    embedded = language_model.get_input_embeddings()(input_ids)
    embedded[places] = visual.flatten(0, 1)
    # A picture is seen from its own first token on.
    sees = places.int().cumsum(dim=1) > 0

    def replacing(there: str, values: Tensor) -> Callable[..., Tensor]:
        def hook(block: Any, args: Any, kwargs: Any, _: Any) -> Tensor:
            x = args[0] if args else kwargs["hidden_states"]
            u = block.input_layernorm(x)
            attended = apply_cross(tensors, f"{there}.ucross_attn", u, values, sees)
            u = u + tensors[f"{there}.ucross_xattn.weight"].tanh() * attended
            gate = F.linear(u, tensors[f"{there}.ucross_mlp.gate_proj.weight"])
            up = F.linear(u, tensors[f"{there}.ucross_mlp.up_proj.weight"])
            down = F.linear(F.silu(gate) * up, tensors[f"{there}.ucross_mlp.down_proj.weight"])
            u = u + tensors[f"{there}.ucross_xmlp.weight"].tanh() * down * sees.unsqueeze(-1)
            own_attention, _ = block.self_attn(
                hidden_states=u,
                position_embeddings=kwargs["position_embeddings"],
                attention_mask=kwargs["attention_mask"],
            )
            z = block.post_attention_layernorm(x + own_attention)
            return z + block.mlp(z)

        return hook

    handles: list[Any] = []
    for block, values in memory.items():
        module = language_model.model.layers[block]
        hook = replacing(f"model.layers.{block}", values)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        return language_model(inputs_embeds=embedded, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
