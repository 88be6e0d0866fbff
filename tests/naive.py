"""The formulas of the fusion strategies, token by token in float64 numpy, from weights alone.

Nothing here calls a strategy: `Problem.of` copies the weights, options and layers of one, and the
functions below, named as the strategies, compute what it should give. `deformable` has its own
reference in `tests/test_deformable.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from layerfuse.fusion import FUSIONS, FixedWeights, Fusion, Guidance
from layerfuse.vision.features import Features

Array = np.ndarray
Weights = dict[str, Array]


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def weights_of(module: nn.Module) -> Weights:
    """Parameters and buffers, by name."""
    return {name: array(tensor) for name, tensor in module.state_dict().items()}


def part(weights: Weights, prefix: str) -> Weights:
    """The weights below one name, without that name."""
    start = prefix + "."
    return {name[len(start) :]: w for name, w in weights.items() if name.startswith(start)}


def linear(weights: Weights, x: Array) -> Array:
    return weights["weight"] @ x + weights.get("bias", 0.0)


def gelu(x: Array) -> Array:
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def silu(x: Array) -> Array:
    return np.array([v / (1 + math.exp(-v)) for v in x])


def relu(x: Array) -> Array:
    return np.array([max(v, 0.0) for v in x])


def softmax(x: Array) -> Array:
    highest = max(x)
    powers = [math.exp(v - highest) for v in x]
    total = sum(powers)
    return np.array([p / total for p in powers])


def layer_norm(weights: Weights, x: Array, eps: float = 1e-5) -> Array:
    center = sum(x) / len(x)
    variance = sum((v - center) ** 2 for v in x) / len(x)
    return (x - center) / math.sqrt(variance + eps) * weights["weight"] + weights["bias"]


def rms_norm(weights: Weights, x: Array, eps: float = 1e-6) -> Array:
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * weights["weight"]


def mean(vectors: list[Array]) -> Array:
    return sum(vectors[1:], vectors[0]) / len(vectors)


def projector(weights: Weights, x: Array) -> Array:
    """Linear, or Linear, exact GELU, Linear; then the stored scale."""
    hidden = linear(part(weights, "linear_1"), x)
    if "linear_2.weight" in weights:
        hidden = linear(part(weights, "linear_2"), gelu(hidden))
    return hidden * weights["scale"]


def block_of(placement: Any, index: int, layer: int, count: int, depth: int, blocks: int) -> int:
    """The LLM block of the `index`-th of `count` layers; encoder of `depth` blocks."""
    if placement == "proportional":
        return max(int(layer * blocks / depth - 1), 0)
    if placement == "first":
        return index + 1  # the output of block i is the input of block i + 1
    if placement == "last":
        return blocks - count + index
    return placement[index]


@dataclass
class Answer:
    """What a strategy should give: tokens (B, N', H), memory by block (B, N, *), weights (B, n)."""

    tokens: Array
    memory: dict[int, Array] = field(default_factory=dict)
    weights: Array | None = None


@dataclass
class Problem:
    """A strategy's weights and options, and the features of some images."""

    name: str
    options: Any
    groups: tuple[tuple[int, ...], ...]
    depth: int
    llm_depth: int
    has_cls: bool
    weights: Weights
    patches: dict[int, Array]
    summary: dict[int, Array]
    instruction: Array | None = None
    guidance: Any = "instruction"

    @classmethod
    def of(
        cls,
        fusion: Fusion,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> "Problem":
        shapes = fusion.shapes
        return cls(
            name=next(n for n in FUSIONS if FUSIONS[n][1] is type(fusion)),
            options=fusion.config,
            groups=shapes.selection.groups,
            depth=shapes.selection.depth,
            llm_depth=shapes.llm_depth,
            has_cls=shapes.has_cls,
            weights=weights_of(fusion),
            patches=dict(zip(features.layers, map(array, features.patches), strict=True)),
            summary=dict(zip(features.layers, map(array, features.summary), strict=True)),
            instruction=None if instruction is None else array(instruction),
            guidance=array(guidance.weights) if isinstance(guidance, FixedWeights) else guidance,
        )

    @property
    def layers(self) -> list[int]:
        return [k for group in self.groups for k in group]

    @property
    def images(self) -> int:
        return len(next(iter(self.patches.values())))

    @property
    def tokens(self) -> int:
        return next(iter(self.patches.values())).shape[1]

    def part(self, name: str) -> Weights:
        return part(self.weights, name)

    def h(self, layer: int, image: int, token: int) -> Array:
        """One normalised patch token."""
        x, weights = self.patches[layer][image, token], self.part(f"norms.{layer}")
        if self.options.normalize == "layernorm":
            return layer_norm(weights, x)
        if self.options.normalize == "standardize":
            return (x - weights["mean"]) / weights["std"]
        return x

    def group(self, group: tuple[int, ...], image: int, token: int) -> Array:
        return mean([self.h(k, image, token) for k in group])

    def per_token(self, compute: Callable[[int, int], Array]) -> Array:
        """(B, N, *) of what `compute` gives for each token of each image."""
        rows = [[compute(b, n) for n in range(self.tokens)] for b in range(self.images)]
        return np.array(rows)


def single(p: Problem) -> Answer:
    (layer,) = p.layers
    return Answer(p.per_token(lambda b, n: projector(p.part("projector"), p.h(layer, b, n))))


def concat(p: Problem) -> Answer:
    def token(b: int, n: int) -> Array:
        return projector(p.part("projector"), np.concatenate([p.h(k, b, n) for k in p.layers]))

    return Answer(p.per_token(token))


def group_mean(p: Problem) -> Answer:
    def token(b: int, n: int) -> Array:
        parts = [p.group(group, b, n) for group in p.groups] + [p.h(p.options.base, b, n)]
        return projector(p.part("projector"), np.concatenate(parts))

    return Answer(p.per_token(token))


def token_concat(p: Problem) -> Answer:
    stride = p.options.stride
    images = []
    for b in range(p.images):
        tokens = [p.h(p.options.base, b, n) for n in range(p.tokens)]
        for k in p.layers:
            start = 0
            while start + stride <= p.tokens:  # what does not fill a last strip is dropped
                tokens.append(mean([p.h(k, b, start + i) for i in range(stride)]))
                start += stride
        images.append([projector(p.part("projector"), x) for x in tokens])
    return Answer(np.array(images))


def weighted_sum(p: Problem) -> Answer:
    weights = softmax(p.weights["logits"])

    def token(b: int, n: int) -> Array:
        parts = [w * p.group(g, b, n) for w, g in zip(weights, p.groups, strict=True)]
        mix = np.sum(parts, axis=0)
        if p.options.beside == "concat":
            mix = np.concatenate([p.h(p.options.base, b, n), mix])
        elif p.options.beside == "add":
            mix = layer_norm(p.part("norm"), p.h(p.options.base, b, n) + mix)
        return projector(p.part("projector"), mix)

    return Answer(p.per_token(token), weights=weights)


def guided_weights(p: Problem, allocate: Callable[[Problem, int], Array], n: int) -> Array:
    """(B, n): fixed, uniform, or what the instruction of each image says."""
    if isinstance(p.guidance, np.ndarray):
        return np.array([p.guidance] * p.images)
    if p.guidance == "uniform":
        return np.full((p.images, n), 1 / n)
    return np.array([allocate(p, b) for b in range(p.images)])


def _route(p: Problem, image: int) -> Array:
    assert p.instruction is not None
    hidden = relu(linear(p.part("router.0"), p.instruction[image]))
    return softmax(linear(p.part("router.2"), hidden))


def text_routed(p: Problem) -> Answer:
    weights = guided_weights(p, _route, len(p.layers))

    def token(b: int, n: int) -> Array:
        mix = p.h(p.options.base, b, n)
        for w, k in zip(weights[b], (k for group in p.groups for k in group), strict=True):
            mix = mix + w * p.h(k, b, n)
        return projector(p.part("projector"), layer_norm(p.part("norm"), mix))

    return Answer(p.per_token(token), weights=weights)


def multi_head(weights: Weights, query: Array, items: list[Array], heads: int) -> Array:
    """Attention of one query to `items`, which are keys and values, with biases."""
    width = len(query)
    size = width // heads
    matrices, biases = weights["in_proj_weight"], weights["in_proj_bias"]
    thirds = [slice(i * width, (i + 1) * width) for i in range(3)]
    in_q, in_k, in_v = ({"weight": matrices[s], "bias": biases[s]} for s in thirds)
    q = linear(in_q, query)
    keys, values = [linear(in_k, x) for x in items], [linear(in_v, x) for x in items]
    heard = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = np.array([sum(q[own] * k[own]) / math.sqrt(size) for k in keys])
        heard.append(sum(a * v[own] for a, v in zip(softmax(scores), values, strict=True)))
    return linear(part(weights, "out_proj"), np.concatenate(heard))


def _allocate(p: Problem, image: int) -> Array:
    assert p.instruction is not None
    by_mean = p.options.summary == "mean" or (p.options.summary == "auto" and not p.has_cls)
    items = []
    for i, group in enumerate(p.groups):
        stands = [list(p.patches[k][image]) if by_mean else [p.summary[k][image]] for k in group]
        item = linear(p.part("allocator.group"), mean([mean(x) for x in stands]))
        if p.options.group_identity:
            item = item + p.weights["allocator.identity"][i]
        items.append(item)
    q = linear(p.part("allocator.sentence"), p.instruction[image])
    for i in range(4):
        block = p.part(f"allocator.blocks.{i}")
        q = layer_norm(part(block, "norm_1"), q + multi_head(part(block, "attention"), q, items, 4))
        inner = linear(part(block, "ffn.2"), relu(linear(part(block, "ffn.0"), q)))
        q = layer_norm(part(block, "norm_2"), q + inner)
    return softmax(linear(p.part("allocator.output"), q))


def instruction_weighted(p: Problem) -> Answer:
    weights = guided_weights(p, _allocate, len(p.groups))

    def token(b: int, n: int) -> Array:
        parts = [w * p.group(g, b, n) for w, g in zip(weights[b], p.groups, strict=True)]
        mix = np.sum(parts, axis=0)
        return projector(p.part("projector"), np.concatenate([p.h(p.options.base, b, n), mix]))

    return Answer(p.per_token(token), weights=weights)


def inject_add(p: Problem) -> Answer:
    tokens = p.per_token(lambda b, n: projector(p.part("projector"), p.h(p.options.base, b, n)))
    memory: dict[int, Array] = {}
    for i, k in enumerate(p.layers):
        block = block_of(p.options.placement, i, k, len(p.layers), p.depth, p.llm_depth)
        own = p.part(f"projectors.{i}")
        added = p.per_token(lambda b, n, k=k, own=own: projector(own, p.h(k, b, n)))
        if p.options.gate:
            added = added * math.tanh(p.weights["gates"][i])
        memory[block] = memory.get(block, 0) + added
    return Answer(tokens, memory)


def inject_cross(p: Problem) -> Answer:
    tokens = p.per_token(lambda b, n: projector(p.part("projector"), p.h(p.options.base, b, n)))
    memory: dict[int, Array] = {}
    for i, k in enumerate(p.layers):
        block = block_of(p.options.placement, i, k, len(p.layers), p.depth, p.llm_depth)
        own, attend = p.part(f"projectors.{i}"), p.part(f"attention.{block}")

        def keys_values(b: int, n: int, k: int = k, own: Weights = own, a: Weights = attend) -> Any:
            x = projector(own, p.h(k, b, n))
            return np.concatenate([linear(part(a, "key"), x), linear(part(a, "value"), x)])

        memory[block] = p.per_token(keys_values)
    return Answer(tokens, memory)


def cross_attention(weights: Weights, heads: int, x: Array, memory: Array, seen: Array) -> Array:
    """tanh(a)·CA of one position x (D) to the keys and values (M, 2 D) that it sees."""
    chosen = [row for row, visible in zip(memory, seen, strict=True) if visible]
    if not chosen:
        return np.zeros_like(x)
    normed = rms_norm(part(weights, "norm"), x) if "norm.weight" in weights else x
    q = linear(part(weights, "query"), normed)
    width, size = len(x), len(x) // heads
    heard = []
    for head in range(heads):
        start = head * size
        keys = np.array([row[start : start + size] for row in chosen])
        values = np.array([row[width + start : width + start + size] for row in chosen])
        attention = softmax(keys @ q[start : start + size] / math.sqrt(size))
        heard.append(attention @ values)
    out = linear(part(weights, "output"), np.concatenate(heard))
    return out * np.tanh(weights["gate"])


def gated_mlp(weights: Weights, x: Array) -> Array:
    """tanh(b)·SwiGLU of one position."""
    normed = rms_norm(part(weights, "norm"), x) if "norm.weight" in weights else x
    inner = silu(linear(part(weights, "gate_proj"), normed))
    inner = inner * linear(part(weights, "up_proj"), normed)
    return linear(part(weights, "down_proj"), inner) * np.tanh(weights["gate"])


def visible(mask: list[bool], each: int) -> list[set[int]]:
    """For each position of one row, the images that it may look at: an image token its own image,
    text the images whose last token stands before it."""
    found, tokens = [], 0
    for image in mask:
        found.append({tokens // each} if image else set(range(tokens // each)))
        tokens += image
    return found


def cross_addition(
    weights: Weights, block: int, heads: int, hidden: Array, images: list[Array], mask: list[bool]
) -> Array:
    """What `inject_cross` adds to one row (T, D), given the memory of each of its images: nothing,
    with or without MLP, where no image is seen."""
    attend, mlp = part(weights, f"attention.{block}"), part(weights, f"mlp.{block}")
    each = len(images[0]) if images else 1
    memory = np.concatenate(images) if images else np.zeros((0, 2 * hidden.shape[1]))
    rows = []
    for x, own in zip(hidden, visible(mask, each), strict=True):
        seen = np.array([k // each in own for k in range(len(memory))], dtype=bool)
        added = cross_attention(attend, heads, x, memory, seen)
        rows.append(added + gated_mlp(mlp, x + added) if mlp and own else added)
    return np.array(rows)


REFERENCES: dict[str, Callable[[Problem], Answer]] = {
    f.__name__: f
    for f in (
        single,
        concat,
        group_mean,
        token_concat,
        weighted_sum,
        text_routed,
        instruction_weighted,
        inject_add,
        inject_cross,
    )
}


def solve(
    fusion: Fusion,
    features: Features,
    instruction: Tensor | None = None,
    guidance: Guidance = "instruction",
) -> Answer:
    """What the strategy's formula gives for these features."""
    problem = Problem.of(fusion, features, instruction, guidance)
    return REFERENCES[problem.name](problem)
