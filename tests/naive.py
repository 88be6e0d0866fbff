"""The formulas of the fusion strategies, token by token in float64 numpy, from weights alone.

Nothing here calls a strategy: `Problem.of` copies the weights, options and layers of one, and the
functions below, named as the strategies, compute what it should give. Each has its formula in its
docstring, in the papers' notation:

    h_k   patch token of layer k, (Dv)        P    projector, (…) -> (H)
    G_i   the i-th selected group of layers   ⊕    channels side by side
    Z_i   mean of h_k over k in G_i, (Dv)     V    token for the LLM, (H)

B images of N patch tokens each. `deformable` has its own reference: `tests/naive_deformable.py`.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from layerfuse.fusion import Fusion, Guidance
from layerfuse.vision.features import Features
from tests.naive_layers import (
    Array,
    Weights,
    array,
    cross_attention,
    gated_mlp,
    layer_norm,
    linear,
    mean,
    multi_head,
    part,
    projector,
    relu,
    softmax,
    weights_of,
)
from tests.naive_problem import Answer, Problem

__all__ = [
    "REFERENCES",
    "Answer",
    "Problem",
    "array",
    "block_of",
    "cross_addition",
    "softmax",
    "solve",
    "visible",
    "weights_of",
]

ALLOCATOR_BLOCKS = 4
ALLOCATOR_HEADS = 4


def single(problem: Problem) -> Answer:
    """V = P(h_k): LLaVA-1.5."""
    (layer,) = problem.layers
    return Answer(problem.projected("projector", layer))


def concat(problem: Problem) -> Answer:
    """V = P(h_a ⊕ h_b ⊕ ...)

    E_D of few layers (2503.06063), SCI of DenseConnector (2405.13800), and with one Linear the
    fusion of 2504.21447.
    """
    weights = problem.part("projector")

    def token_of(image: int, token: int) -> Array:
        # n times (Dv) -> (n · Dv)
        layers = [problem.h(layer, image, token) for layer in problem.layers]
        return projector(weights, np.concatenate(layers))

    return Answer(problem.per_token(token_of))


def group_mean(problem: Problem) -> Answer:
    """V = P(Z_1 ⊕ Z_2 ⊕ ... ⊕ h_base)

    E_D former, latter and all (2503.06063), and DCI of DenseConnector (2405.13800), which has the
    base layer first.
    """
    weights = problem.part("projector")

    def token_of(image: int, token: int) -> Array:
        # n times (Dv), then the base layer -> ((n + 1) · Dv)
        parts = [problem.z(group, image, token) for group in problem.groups]
        parts.append(problem.base(image, token))
        return projector(weights, np.concatenate(parts))

    return Answer(problem.per_token(token_of))


def token_concat(problem: Problem) -> Answer:
    """V = P(x) for x in h_base's N tokens, then AvgPool1d(s, s) of each selected layer's tokens

    STI of DenseConnector (2405.13800).
    """
    stride = problem.options.stride
    weights = problem.part("projector")
    # tokens that do not fill a last strip are dropped: 729 tokens make 91 strips of 8
    strips = problem.tokens // stride

    images: list[list[Array]] = []
    for image in range(problem.images):
        fused: list[Array] = []
        for token in range(problem.tokens):
            fused.append(problem.base(image, token))
        for layer in problem.layers:
            for strip in range(strips):
                # neighbours along the raster, not in two dimensions
                neighbours: list[Array] = []
                for offset in range(stride):
                    neighbours.append(problem.h(layer, image, strip * stride + offset))
                fused.append(mean(neighbours))
        # (N + layers · strips) tokens
        images.append([projector(weights, x) for x in fused])
    return Answer(np.array(images))


def weighted_sum(problem: Problem) -> Answer:
    """The same weights w = softmax(s) for all images, with s learned: the mix Z = Σ_i w_i Z_i.

    V = P(Z), or `beside` the base layer V = P(h_base ⊕ Z) or V = P(LN(h_base + Z)).
    """
    weights = softmax(problem.weights["logits"])

    def fused(image: int, token: int) -> Array:
        mix = problem.mix(weights, image, token)
        if problem.options.beside == "concat":
            # (2 Dv)
            return np.concatenate([problem.base(image, token), mix])
        if problem.options.beside == "add":
            return layer_norm(problem.part("norm"), problem.base(image, token) + mix)
        return mix

    def token_of(image: int, token: int) -> Array:
        return projector(problem.part("projector"), fused(image, token))

    return Answer(problem.per_token(token_of), weights=weights)


def guided_weights(problem: Problem, allocate: Callable[[Problem, int], Array], n: int) -> Array:
    """(B, n): fixed, uniform, or what `allocate` makes of the instruction of each image."""
    weights: list[Array] = []
    for image in range(problem.images):
        if isinstance(problem.guidance, np.ndarray):
            weights.append(problem.guidance)
        elif problem.guidance == "uniform":
            weights.append(np.full(n, 1 / n))
        else:
            weights.append(allocate(problem, image))
    return np.array(weights)


def _route(problem: Problem, image: int) -> Array:
    """TGIF's router: w = softmax(W_2 ReLU(W_1 t + b_1) + b_2), t (H) -> w (n)"""
    assert problem.instruction is not None
    t = problem.instruction[image]
    hidden = relu(linear(problem.part("router.0"), t))
    return softmax(linear(problem.part("router.2"), hidden))


def text_routed(problem: Problem) -> Answer:
    """V = P(LN(h_base + Σ_k w_k h_k)), a weight for every layer: TGIF (2601.03100)."""
    layers = problem.layers
    weights = guided_weights(problem, _route, len(layers))

    def token_of(image: int, token: int) -> Array:
        total = problem.base(image, token)
        for weight, layer in zip(weights[image], layers, strict=True):
            total = total + weight * problem.h(layer, image, token)
        normed = layer_norm(problem.part("norm"), total)
        return projector(problem.part("projector"), normed)

    return Answer(problem.per_token(token_of), weights=weights)


def _summary_of_layer(problem: Problem, layer: int, image: int) -> Array:
    """What stands for a layer in c_k: its CLS token, or the mean of its patches. (Dv)"""
    use_mean = problem.options.summary == "mean"
    if problem.options.summary == "auto":
        use_mean = not problem.has_cls
    if use_mean:
        return mean(list(problem.patches[layer][image]))
    return problem.summary[layer][image]


def _allocate(problem: Problem, image: int) -> Array:
    """IGVA's weight allocator: s (E) and c_1, ..., c_K (Dv) -> w (K)."""
    assert problem.instruction is not None
    s = problem.instruction[image]

    # E = W_c c_k + b, with c_k = mean over i in G_k of CLS_i
    e: list[Array] = []
    for index, group in enumerate(problem.groups):
        summaries = [_summary_of_layer(problem, layer, image) for layer in group]
        c_k = mean(summaries)
        e_k = linear(problem.part("allocator.group"), c_k)
        if problem.options.group_identity:
            # not in the paper: a learned vector that tells the groups apart
            e_k = e_k + problem.weights["allocator.identity"][index]
        e.append(e_k)

    # q_0 = W_s s + b
    q = linear(problem.part("allocator.sentence"), s)
    for index in range(ALLOCATOR_BLOCKS):
        block = problem.part(f"allocator.blocks.{index}")
        # a = MHA(q, E, E); q <- LN(a + q)
        a = multi_head(part(block, "attention"), q, e, ALLOCATOR_HEADS)
        q = layer_norm(part(block, "norm_1"), a + q)
        # q <- LN(FFN(q) + q), with FFN = Linear, ReLU, Linear
        inner = relu(linear(part(block, "ffn.0"), q))
        ffn = linear(part(block, "ffn.2"), inner)
        q = layer_norm(part(block, "norm_2"), ffn + q)
    # w = softmax(W_o q_4 + b_o)
    return softmax(linear(problem.part("allocator.output"), q))


def instruction_weighted(problem: Problem) -> Answer:
    """V = P(h_base ⊕ Σ_k w_k Z_k), a weight for every group: IGVA (2501.08443)."""
    weights = guided_weights(problem, _allocate, len(problem.groups))

    def token_of(image: int, token: int) -> Array:
        mix = problem.mix(weights[image], image, token)
        # (2 Dv)
        fused = np.concatenate([problem.base(image, token), mix])
        return projector(problem.part("projector"), fused)

    return Answer(problem.per_token(token_of), weights=weights)


def block_of(
    placement: Any,
    index: int,
    layer: int,
    *,
    count: int,
    depth: int,
    blocks: int,
) -> int:
    """ℓ(k), the 0-based LLM block of the `index`-th of `count` layers.

    `depth` is the number of the encoder's blocks, `blocks` that of the LLM's, L.
    """
    if placement == "proportional":
        # int(k·L/24 − 1) for an encoder of 24 blocks; layer 0 has no block before the first
        return max(int(layer * blocks / depth - 1), 0)
    if placement == "first":
        # Qwen3-VL adds to the output of block i, which is the input of block i + 1
        return index + 1
    if placement == "last":
        return blocks - count + index
    return placement[index]


def _blocks(problem: Problem) -> list[int]:
    """The LLM block of every selected layer."""
    blocks: list[int] = []
    for index, layer in enumerate(problem.layers):
        block = block_of(
            problem.options.placement,
            index,
            layer,
            count=len(problem.layers),
            depth=problem.depth,
            blocks=problem.llm_depth,
        )
        blocks.append(block)
    return blocks


def inject_add(problem: Problem) -> Answer:
    """V_0 = P_f(h_base); before block ℓ(k), x[image] <- x[image] + tanh(g_k)·P_k(h_k): I_D."""
    tokens = problem.projected("projector", problem.options.base)
    memory: dict[int, Array] = {}
    for index, block in enumerate(_blocks(problem)):
        added = problem.projected(f"projectors.{index}", problem.layers[index])
        if problem.options.gate:
            added = added * math.tanh(problem.weights["gates"][index])
        # layers of one block are all added
        memory[block] = memory.get(block, np.zeros_like(added)) + added
    return Answer(tokens, memory)


def inject_cross(problem: Problem) -> Answer:
    """V_0 = P_f(h_base); the memory of block ℓ(k) holds W_k V_k ⊕ W_v V_k, V_k = P_k(h_k): I_M."""
    tokens = problem.projected("projector", problem.options.base)
    memory: dict[int, Array] = {}
    for index, block in enumerate(_blocks(problem)):
        # (B, N, H)
        projected = problem.projected(f"projectors.{index}", problem.layers[index])
        key_weights = problem.part(f"attention.{block}.key")
        value_weights = problem.part(f"attention.{block}.value")
        keys_values: list[list[Array]] = []
        for image in projected:
            of_image: list[Array] = []
            for v_k in image:
                key = linear(key_weights, v_k)
                value = linear(value_weights, v_k)
                of_image.append(np.concatenate([key, value]))
            keys_values.append(of_image)
        memory[block] = np.array(keys_values)
    return Answer(tokens, memory)


def visible(mask: list[bool], each: int) -> list[set[int]]:
    """The images that each position of one row may look at.

    An image token sees its own image, text the images whose last token stands before it. `mask`
    (T) is true at image tokens, of which every image has `each`.
    """
    visible_images: list[set[int]] = []
    image_tokens_before = 0
    for is_image_token in mask:
        finished_images = image_tokens_before // each
        if is_image_token:
            # those before it fill the finished images and a part of its own
            visible_images.append({finished_images})
            image_tokens_before += 1
        else:
            visible_images.append(set(range(finished_images)))
    return visible_images


def cross_addition(
    weights: Weights,
    block: int,
    hidden: Array,
    *,
    heads: int,
    images: list[Array],
    mask: list[bool],
) -> Array:
    """What `inject_cross` adds to one row (T, H) of the LLM's hidden states.

    tanh(a)·CA(N(x), V_k), and with `mlp` also tanh(b)·MLP(N'(x')) of x' = x + what CA added. A
    position that sees no image gets nothing, with or without MLP. `images` holds the memory (N, 2
    H) of each image of the row.
    """
    attention_weights = part(weights, f"attention.{block}")
    mlp_weights = part(weights, f"mlp.{block}")
    tokens_per_image = 1
    memory = np.zeros((0, 2 * hidden.shape[1]))
    if images:
        tokens_per_image = len(images[0])
        # images side by side: (images · N, 2 H)
        memory = np.concatenate(images)

    rows: list[Array] = []
    for x, visible_images in zip(hidden, visible(mask, tokens_per_image), strict=True):
        seen = [key // tokens_per_image in visible_images for key in range(len(memory))]
        added = cross_attention(
            attention_weights,
            x,
            heads=heads,
            memory=memory,
            seen=np.array(seen, dtype=bool),
        )
        if mlp_weights and visible_images:
            added = added + gated_mlp(mlp_weights, x + added)
        rows.append(added)
    return np.array(rows)


REFERENCES: dict[str, Callable[[Problem], Answer]] = {
    "single": single,
    "concat": concat,
    "group_mean": group_mean,
    "token_concat": token_concat,
    "weighted_sum": weighted_sum,
    "text_routed": text_routed,
    "instruction_weighted": instruction_weighted,
    "inject_add": inject_add,
    "inject_cross": inject_cross,
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
