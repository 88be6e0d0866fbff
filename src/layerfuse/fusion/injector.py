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

from threading import get_ident
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import Fusion, Shapes
from layerfuse.fusion.visual import Placed

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""families with a norm before each branch"""
SANDWICH = ("gemma2", "gemma3_text")
"""families with a norm before and one after each branch"""
Placement = Literal["proportional", "first", "last"] | tuple[int, ...]
"""how selected layers are given to LLM blocks: a rule, or one 0-based block per layer"""


class Injector:
    """The hooks of one decoder block.

    `visual` and `pending` hold what one hook leaves for the next; they are empty between blocks.
    Each has one entry per thread that is inside the block.

    Args:
        position: where in the block the strategy's `addition` is added.
        block: 0-based index of the block.
    """

    def __init__(self, position: str, block: int) -> None:
        self.position = position
        self.block = block
        self.visual: dict[int, Placed] = {}
        self.pending: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Injector":
        # what is under way belongs to the original
        twin = Injector(self.position, self.block)
        memo[id(self)] = twin
        return twin

    def attach(self, block: nn.Module, llm_family: str) -> None:
        """Register the hooks that the position needs.

        Args:
            block: a decoder block; for positions other than `pre` of a family in `PLAIN` or
                `SANDWICH`.
            llm_family: the LLM's `model_type`.
        """
        position = self.position
        if position == "pre":
            block.register_forward_pre_hook(self.before_block, with_kwargs=True)
            return

        # The submodule whose output joins the residual stream, and N2 between the branches: with
        # a norm after each branch, what is added must come after that norm.
        if llm_family in SANDWICH:
            middle = "pre_feedforward_layernorm"
            end_of_attention = "post_attention_layernorm"
            end_of_mlp = "post_feedforward_layernorm"
        else:
            middle = "post_attention_layernorm"
            end_of_attention = "self_attn"
            end_of_mlp = "mlp"
        branch = end_of_mlp
        if position == "parallel":
            branch = end_of_attention

        attention = block.get_submodule("self_attn")
        attention.register_forward_pre_hook(self.before_attention, with_kwargs=True)
        block.get_submodule(branch).register_forward_hook(self.after_branch)
        if position == "post":
            block.get_submodule(middle).register_forward_pre_hook(self.before_middle)
        elif position == "released":
            block.get_submodule(middle).register_forward_hook(self.after_middle)

    # The hooks. Any: blocks of transformers share no type for what they take and give.

    def _take(self, kwargs: dict[str, Any]) -> Placed | None:
        """Remove the keyword, which the block itself does not know."""
        visual: Placed | None = kwargs.pop("visual", None)
        if visual is None:
            return None
        visual.reached.add(self.block)
        if self.block not in visual.memory:
            return None
        return visual

    def _addition(self, hidden: Tensor, visual: Placed) -> Tensor:
        """What the strategy adds to a hidden state, which may be on another device than the fusion:
        a `device_map` moves what a block takes, and not what reaches it by a keyword of ours."""
        there = hidden.to(visual.seen.device)
        return visual.adds(self.block, there, visual).to(hidden.device)

    def before_block(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`pre`: change the block's input."""
        visual = self._take(kwargs)
        if visual is None:
            return args, kwargs
        hidden = args[0]
        added = self._addition(hidden, visual)
        return (hidden + added, *args[1:]), kwargs

    def before_attention(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Take the keyword; `parallel` and `released` make their addition from N1 x."""
        # A pass that an error ended may have left something.
        self.forget()
        visual = self._take(kwargs)
        hidden: Tensor = kwargs["hidden_states"]
        if visual is None:
            return args, kwargs
        if hidden.requires_grad and not torch.compiler.is_compiling():
            # Activation checkpointing stops recomputing as soon as it has all that the backward
            # pass needs, which is before the last hook: then the gradient cleans up.
            # Any: torch does not type the hooks of tensors.
            differentiable: Any = hidden
            differentiable.register_hook(self.forget)
        self.visual[_thread()] = visual
        # `post` makes its addition from the output of the attention, in `before_middle`.
        if self.position == "post":
            return args, kwargs
        added = self._addition(hidden, visual)
        if self.position == "parallel":
            self.pending[_thread()] = added
        else:
            kwargs["hidden_states"] = hidden + added
        return args, kwargs

    def before_middle(self, module: Any, args: tuple[Tensor, ...]) -> Any:
        """`post`: N2 sees y + add(y)."""
        visual = self.visual.get(_thread())
        if visual is None:
            return args
        hidden = args[0]
        added = self._addition(hidden, visual)
        # The block has kept y as its residual: the same is added to the MLP's output once more.
        self.pending[_thread()] = added
        return (hidden + added, *args[1:])

    def after_middle(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        """`released`: in rows with images the residual after attention is N2 y instead of y."""
        visual = self.visual.get(_thread())
        if visual is None:
            return
        # N2 y − y is added later, as the block itself adds y; (rows,) -> (rows, 1, 1)
        has_images = visual.seen.any(dim=2).any(dim=1)[:, None, None]
        change = output - args[0]
        self.pending[_thread()] = change.masked_fill(~has_images.to(change.device), 0)

    def after_branch(self, module: Any, args: Any, output: Any) -> Any:
        """Add what is pending to what the branch adds to the residual stream."""
        pending = self.pending.get(_thread())
        self.forget()
        if pending is None:
            return output
        # Attention gives its weights beside its output.
        if isinstance(output, Tensor):
            return output + pending
        return (output[0] + pending, *output[1:])

    def forget(self, gradient: Tensor | None = None) -> None:
        """Drop what is left of a pass through the block.

        Args:
            gradient: ignored; a hook of a tensor is called with its gradient.
        """
        self.visual.pop(_thread(), None)
        self.pending.pop(_thread(), None)


def _thread() -> int:
    """This thread, so that models can answer several at once; a compiled graph has one."""
    if torch.compiler.is_compiling():
        return 0
    return get_ident()


def llm_blocks(placement: Placement, shapes: Shapes) -> tuple[int, ...]:
    """The 0-based LLM block l(k) of every selected layer k, in the order of the layers.

    Args:
        placement: a rule, or the blocks themselves.
        shapes: what the encoder and the LLM are like.

    Raises:
        LayerfuseError: if a block does not exist, or there are not as many blocks as layers.
    """
    layers = shapes.selection.layers
    depth = shapes.llm_depth
    if placement == "proportional":
        # int(k · L / n − 1), and the first block for layers before it (2503.06063)
        encoder_depth = shapes.selection.depth
        return tuple(max(0, layer * depth // encoder_depth - 1) for layer in layers)

    if isinstance(placement, tuple):
        if len(placement) != len(layers):
            raise LayerfuseError(
                f"placement {list(placement)} must name a block for each of {layers}"
            )
        blocks = placement
    elif placement == "first":
        # Qwen3-VL adds to the output of block 0, which is before block 1
        blocks = tuple(range(1, 1 + len(layers)))
    else:
        blocks = tuple(range(depth - len(layers), depth))
    if min(blocks) < 0 or max(blocks) >= depth:
        raise LayerfuseError(
            f"cannot place layers {list(layers)} by {placement!r}: the LLM has {depth} blocks, "
            f"0..{depth - 1}"
        )
    return blocks


def attach(fusion: Fusion[Any], blocks: nn.ModuleList) -> None:
    """Let a strategy reach every decoder block. Call once, when the model is built.

    Args:
        fusion: the strategy.
        blocks: the LLM's decoder blocks. All get hooks, since each must take the keyword.
    """
    for index, block in enumerate(blocks):
        Injector(fusion.position, index).attach(block, fusion.shapes.llm_family)


def detach(language_model: nn.Module) -> None:
    """Remove the hooks of every strategy, so that another can be attached.

    Args:
        language_model: an LLM, perhaps of another `FusionVLM`.
    """
    for module in language_model.modules():
        # Torch removes hooks by handles alone, which a copied module has none of.
        # Any: it neither types its tables of hooks nor gives them public names
        untyped: Any = module
        for hooks in (untyped._forward_pre_hooks, untyped._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, MethodType) and isinstance(hook.__self__, Injector):
                    del hooks[key]
