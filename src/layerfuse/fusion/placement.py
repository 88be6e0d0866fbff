"""Which LLM block each injected layer goes to."""

from typing import Literal

from layerfuse.fusion.base import Shapes

Placement = Literal["proportional", "first", "last"] | tuple[int, ...]


def llm_blocks(placement: Placement, shapes: Shapes) -> tuple[int, ...]:
    """The 0-based LLM block l(k) of every selected layer k, in the order of the layers.

    Raises ValueError if a block does not exist or there are more layers than blocks.
    """
    layers, depth = shapes.selection.layers, shapes.llm_depth
    if placement == "proportional":
        n = shapes.selection.depth
        return tuple(max(0, k * depth // n - 1) for k in layers)
    if isinstance(placement, tuple):
        if len(placement) != len(layers):
            raise ValueError(f"placement {list(placement)} must name a block for each of {layers}")
        blocks = placement
    else:
        start = 1 if placement == "first" else depth - len(layers)
        blocks = tuple(range(start, start + len(layers)))
    if min(blocks) < 0 or max(blocks) >= depth:
        raise ValueError(
            f"cannot place layers {list(layers)} by {placement!r}: the LLM has {depth} blocks, "
            f"0..{depth - 1}"
        )
    return blocks
