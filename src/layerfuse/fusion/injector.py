"""How internal fusion reaches the decoder blocks of a stock LLM: by hooks, without forking them.

`Fusion.position` says where a block gets `Fusion.addition` (x: its input; SA, MLP: its branches;
N1, N2: the norms before them; add: the addition):

    pre       block(x + add(x))
    post      y = x + SA(N1 x);  y' = y + add(y);  y' + MLP(N2 y')
    parallel  y = x + SA(N1 x) + add(N1 x);        y + MLP(N2 y)
    released  y = x + SA(u + add(u)), u = N1 x;    N2 y + MLP(N2 y)

In blocks with a norm after each branch (gemma2, gemma3) SA and MLP include that norm, so that what
is added reaches the residual stream as it is. `released` is the residual of a published release,
kept for study. With `pre`, any LLM will do; the others know the builds in `PLAIN` and `SANDWICH`.

The keyword `visual` travels through the LLM to every block. Hooks on a block itself stand outside
activation checkpointing; hooks on its parts run again when it recomputes the block, with the same
keyword, so that what they keep between them never outlives one pass through the block. Positions
other than `pre` need checkpointing without reentry, transformers' default.
"""

import copy
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerfuse.fusion.base import Fusion, Shapes
from layerfuse.fusion.visual import Placed

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
SANDWICH = ("gemma2", "gemma3_text")
Placement = Literal["proportional", "first", "last"] | tuple[int, ...]


class Injector:
    """The hooks of one decoder block. `visual` and `kept` hold, per thread, what one hook leaves
    for the next; they are empty between blocks."""

    def __init__(self, fusion: Fusion, block: int) -> None:
        self.fusion = fusion
        self.block = block
        self.visual: dict[int, Placed] = {}
        self.kept: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Injector":
        memo[id(self)] = twin = Injector(copy.deepcopy(self.fusion, memo), self.block)
        return twin

    def attach(self, block: nn.Module) -> None:
        """Register the hooks that the fusion's position needs."""
        position = self.fusion.position
        if position == "pre":
            block.register_forward_pre_hook(self.before_block, with_kwargs=True)
            return
        part = block.get_submodule
        sandwich = self.fusion.shapes.llm_family in SANDWICH
        middle = part("pre_feedforward_layernorm" if sandwich else "post_attention_layernorm")
        if position == "parallel":
            branch = part("post_attention_layernorm" if sandwich else "self_attn")
        else:
            branch = part("post_feedforward_layernorm" if sandwich else "mlp")
        part("self_attn").register_forward_pre_hook(self.before_attention, with_kwargs=True)
        branch.register_forward_hook(self.after_branch)
        if position == "post":
            middle.register_forward_pre_hook(self.before_middle)
        elif position == "released":
            middle.register_forward_hook(self.after_middle)

    def _take(self, kwargs: dict[str, Any]) -> Placed | None:
        visual: Placed | None = kwargs.pop("visual", None)
        return visual if visual is not None and self.block in visual.memory else None

    def before_block(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`pre`: change the block's input."""
        visual = self._take(kwargs)
        if visual is None:
            return args, kwargs
        return (args[0] + self.fusion.addition(self.block, args[0], visual), *args[1:]), kwargs

    def before_attention(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Take the keyword; `parallel` and `released` make their addition from N1 x."""
        self.forget()
        visual, hidden = self._take(kwargs), kwargs["hidden_states"]
        if visual is None:
            return args, kwargs
        if hidden.requires_grad and not torch.compiler.is_compiling():
            hidden.register_hook(self.forget)  # a recomputation stops before the last hook
        self.visual[_thread()] = visual
        if self.fusion.position == "post":
            return args, kwargs
        added = self.fusion.addition(self.block, hidden, visual)
        if self.fusion.position == "parallel":
            self.kept[_thread()] = added
        else:
            kwargs["hidden_states"] = hidden + added
        return args, kwargs

    def before_middle(self, module: Any, args: tuple[Tensor, ...]) -> Any:
        """`post`: N2 sees y + add(y)."""
        visual = self.visual.get(_thread())
        if visual is None:
            return args
        added = self.fusion.addition(self.block, args[0], visual)
        self.kept[_thread()] = added
        return (args[0] + added, *args[1:])

    def after_middle(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        """`released`: in rows with images the residual after attention is N2 y instead of y."""
        visual = self.visual.get(_thread())
        if visual is not None:
            rows = visual.seen.any(dim=2).any(dim=1)
            self.kept[_thread()] = (output - args[0]).masked_fill(~rows[:, None, None], 0)

    def after_branch(self, module: Any, args: Any, output: Any) -> Any:
        """Add what was kept to what the branch adds to the residual stream."""
        kept = self.kept.get(_thread())
        self.forget()
        if kept is None:
            return output
        return (output[0] + kept, *output[1:]) if isinstance(output, tuple) else output + kept

    def forget(self, gradient: Tensor | None = None) -> None:
        """Drop what is left of a pass through the block."""
        self.visual.pop(_thread(), None)
        self.kept.pop(_thread(), None)


def _thread() -> int:
    """This thread, so that models can answer several at once; a compiled graph has one."""
    return 0 if torch.compiler.is_compiling() else get_ident()


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


def attach(fusion: Fusion, blocks: nn.ModuleList) -> None:
    """Let `fusion` reach every decoder block. Call once, when the model is built."""
    for index, block in enumerate(blocks):
        Injector(fusion, index).attach(block)
