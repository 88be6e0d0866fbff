"""One layer, one projector.

    V = P(h_k)

The baseline of the field: LLaVA-1.5 (Liu et al., 2310.03744) with k = 23 of CLIP-L.
"""

from typing import Self

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import options, register
from layerfuse.fusion.concat import Concat, ConcatConfig
from layerfuse.vision.selection import Selection


@options
class SingleConfig(ConcatConfig):
    """Options of `single`."""

    def resolve(self, selection: Selection) -> Self:
        # this strategy has no base layer and no mix: another number of layers would be a mistake
        if len(selection.layers) != 1:
            raise LayerfuseError(
                f"fusion 'single' takes exactly one layer, not {list(selection.layers)}; "
                "use 'concat' or 'group_mean' for several"
            )
        return self


@register("single", SingleConfig)
class Single(Concat):
    """One layer projected to the LLM's width: a concatenation of one."""

    kind = "baseline"
    paper = "LLaVA-1.5"
    summary = "one layer, MLP"
    published = "-2"
