"""Layers of neural networks for one vector at a time, in float64 numpy, from their formulas.

Nothing here lets torch or layerfuse compute: weights are read out of modules, under the names that
they have there, and every formula is written out. Vectors are arrays of one axis: x (D) goes in.
"""

import math
from typing import Any

import numpy as np
from torch import Tensor, nn

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]
"""of a module, by the names of its `state_dict`"""


def array(tensor: Tensor) -> Array:
    """The values of a tensor in float64."""
    return tensor.detach().double().numpy()


def weights_of(module: nn.Module) -> Weights:
    """Parameters and buffers, by name."""
    weights: Weights = {}
    for name, tensor in module.state_dict().items():
        weights[name] = array(tensor)
    return weights


def part(weights: Weights, prefix: str) -> Weights:
    """The weights below one name, without that name; empty if there are none."""
    start = prefix + "."
    below: Weights = {}
    for name, values in weights.items():
        if name.startswith(start):
            below[name.removeprefix(start)] = values
    return below


def linear(weights: Weights, x: Array) -> Array:
    """W x + b: (D) -> (E), with W (E, D); b is zero in layers without bias."""
    bias = weights.get("bias", 0.0)
    return weights["weight"] @ x + bias


def gelu(x: Array) -> Array:
    """v Φ(v) in every channel: the exact one, not its approximation by tanh."""
    activated: list[float] = []
    for v in x:
        share_below = 0.5 * (1 + math.erf(v / math.sqrt(2)))
        activated.append(v * share_below)
    return np.array(activated)


def silu(x: Array) -> Array:
    """v σ(v) in every channel."""
    activated: list[float] = []
    for v in x:
        sigmoid = 1 / (1 + math.exp(-v))
        activated.append(v * sigmoid)
    return np.array(activated)


def relu(x: Array) -> Array:
    """max(v, 0) in every channel."""
    return np.array([max(v, 0.0) for v in x])


def softmax(x: Array) -> Array:
    """exp(x_i) / Σ_j exp(x_j)"""
    # the same number subtracted everywhere cancels, and keeps exp from overflowing
    highest = max(x)
    powers = [math.exp(v - highest) for v in x]
    total = sum(powers)
    return np.array([power / total for power in powers])


def layer_norm(weights: Weights, x: Array, eps: float = 1e-5) -> Array:
    """(x - mean) / √(variance + eps) · weight + bias, with the variance over D and not D - 1."""
    width = len(x)
    center = sum(x) / width
    squares = [(v - center) ** 2 for v in x]
    variance = sum(squares) / width
    normed = (x - center) / math.sqrt(variance + eps)
    return normed * weights["weight"] + weights["bias"]


def rms_norm(weights: Weights, x: Array, eps: float = 1e-6) -> Array:
    """x / √(mean square + eps) · weight"""
    squares = [v * v for v in x]
    mean_square = sum(squares) / len(x)
    return x / math.sqrt(mean_square + eps) * weights["weight"]


def mean(vectors: list[Array]) -> Array:
    """The mean of vectors (D)."""
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        total = total + vector
    return total / len(vectors)


def projector(weights: Weights, x: Array) -> Array:
    """P(x): Linear, exact GELU, Linear, or one Linear; then the stored scale. (D) -> (H)"""
    hidden = linear(part(weights, "linear_1"), x)
    if "linear_2.weight" in weights:
        hidden = linear(part(weights, "linear_2"), gelu(hidden))
    return hidden * weights["scale"]


def attend(query: Array, keys: list[Array], values: list[Array]) -> Array:
    """One head: Σ_i a_i v_i with a = softmax_i(q · k_i / √d), all vectors (d)."""
    size = len(query)
    scores: list[float] = []
    for key in keys:
        scores.append(float(query @ key) / math.sqrt(size))
    attention = softmax(np.array(scores))
    read = np.zeros(size)
    for share, value in zip(attention, values, strict=True):
        read = read + share * value
    return read


def head_channels(width: int, heads: int) -> list[slice]:
    """The channels of each head: D / heads neighbours."""
    size = width // heads
    return [slice(head * size, (head + 1) * size) for head in range(heads)]


def multi_head(weights: Weights, query: Array, items: list[Array], heads: int) -> Array:
    """MHA(q, E, E) with biases: one query (D) looks at `items`, each (D), as keys and values."""
    # torch.nn.MultiheadAttention keeps W_q, W_k and W_v in one matrix (3 D, D), in this order
    w_q, w_k, w_v = np.split(weights["in_proj_weight"], 3)
    b_q, b_k, b_v = np.split(weights["in_proj_bias"], 3)
    q = w_q @ query + b_q
    keys = [w_k @ item + b_k for item in items]
    values = [w_v @ item + b_v for item in items]

    # each head reads D / heads channels; side by side they are (D) again
    read_by_heads: list[Array] = []
    for channels in head_channels(len(query), heads):
        keys_of_head = [key[channels] for key in keys]
        values_of_head = [value[channels] for value in values]
        read_by_heads.append(attend(q[channels], keys_of_head, values_of_head))
    return linear(part(weights, "out_proj"), np.concatenate(read_by_heads))


def input_norm(weights: Weights, x: Array) -> Array:
    """N(x) of a gated part; x itself where the LLM's block has normalised it (`parallel`)."""
    if "norm.weight" in weights:
        return rms_norm(part(weights, "norm"), x)
    return x


def cross_attention(
    weights: Weights,
    x: Array,
    *,
    heads: int,
    memory: Array,
    seen: Array,
) -> Array:
    """tanh(a)·CA(N(x), V): what one position x (D) reads from an image.

    No bias and no positions (RoPE). `memory` (M, 2 D) holds M keys and values side by side, and
    `seen` (M) says which of them the position may look at.
    """
    width = len(x)
    keys: list[Array] = []
    values: list[Array] = []
    for row, is_seen in zip(memory, seen, strict=True):
        if is_seen:
            keys.append(row[:width])
            values.append(row[width:])
    if not keys:
        # softmax over nothing is no number; who sees nothing reads nothing
        return np.zeros_like(x)

    q = linear(part(weights, "query"), input_norm(weights, x))
    # each head reads D / heads channels; side by side they are (D) again
    read_by_heads: list[Array] = []
    for channels in head_channels(width, heads):
        keys_of_head = [key[channels] for key in keys]
        values_of_head = [value[channels] for value in values]
        read_by_heads.append(attend(q[channels], keys_of_head, values_of_head))
    output = linear(part(weights, "output"), np.concatenate(read_by_heads))
    return output * np.tanh(weights["gate"])


def gated_mlp(weights: Weights, x: Array) -> Array:
    """tanh(b)·SwiGLU(N(x)) of one position x (D): W_down(silu(W_gate N(x)) · W_up N(x))."""
    normed = input_norm(weights, x)
    gate = silu(linear(part(weights, "gate_proj"), normed))
    up = linear(part(weights, "up_proj"), normed)
    output = linear(part(weights, "down_proj"), gate * up)
    return output * np.tanh(weights["gate"])
