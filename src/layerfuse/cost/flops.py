"""Parameters and FLOPs, counted on the meta device."""

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import Layout
from layerfuse.fusion.visual import Fused, Placed
from layerfuse.model.config import FusionConfig
from layerfuse.model.pretrained import decoder_blocks, text_config_of
from layerfuse.model.vlm import FusionVLM
from layerfuse.recipe.model_source import ModelSource
from layerfuse.vision.encoder import load_vision_config
from layerfuse.vision.features import Features

TEXT_TOKENS = 64
"""text tokens per sample in the FLOP estimate, beside the visual ones"""
PARTS = ("vision", "fusion", "llm")
"""the parts of a model, by their names in a recipe"""
Known = dict[tuple[str, Any, int], int]
"""FLOPs that strategies share, by part, by what they depend on and by the length of the row"""


def tokens_of(model: FusionVLM, size: int) -> int:
    """Number of tokens that replace one image.

    Args:
        model: the model that reads the image.
        size: height and width of the image in pixels.

    Returns:
        Tokens per image.
    """
    return model.config.num_image_tokens(size, size)


def parts_of(model: FusionVLM) -> dict[str, nn.Module]:
    """The modules of a model by the names of `PARTS`."""
    return {
        "vision": model.vision_tower,
        "fusion": model.fusion,
        "llm": model.language_model,
    }


def count(config: FusionConfig) -> tuple[FusionVLM, dict[str, int]]:
    """Build a model without memory for its weights, and count them.

    Args:
        config: the configuration of the model.

    Returns:
        The model on the meta device, and the number of parameters of each of `PARTS`. Those of the
        fusion include the stored constants of `normalize`, which work and weigh as parameters do.
    """
    # The steps below write into the configuration of the LLM.
    config = copy.deepcopy(config)
    # Tensors on the meta device hold no numbers, so drawing random weights would only take time.
    with torch.device("meta"), no_init_weights():
        model = FusionVLM(config).eval()
        # Without initialisation transformers leaves a tied head a table of its own, which would
        # count the embeddings of the words twice.
        model.language_model.tie_weights()
        # As when a model is composed: a new token for images needs a row in the embeddings.
        vocabulary = model.language_model.get_input_embeddings().weight.shape[0]
        if config.image_token_id >= vocabulary:
            model.language_model.resize_token_embeddings(
                config.image_token_id + 1,
                mean_resizing=False,
            )
    # Tokens are sent to experts by matrix products of their own. Other ways look at which expert
    # was chosen, which the meta device does not know.
    model.language_model.set_experts_implementation("batched_mm")
    parameters = {}
    for name, part in parts_of(model).items():
        parameters[name] = sum(weight.numel() for weight in part.parameters())
    for constant in model.fusion.norms.buffers():
        parameters["fusion"] += constant.numel()
    return model, parameters


@torch.no_grad()
def flops(
    model: FusionVLM,
    size: int,
    known: Known | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, int]:
    """Forward FLOPs of one image and TEXT_TOKENS tokens of text.

    Torch counts them from the matrix products of a forward pass on meta tensors. What is injected
    into blocks of the LLM counts with the LLM.

    Args:
        model: a model on the meta device.
        size: height and width of the image in pixels.
        known: what was counted for other strategies with the same encoder and LLM; what they
            share is read from here, and what is counted is added.
        parts: which of `PARTS` to count; the fusion is always counted.

    Returns:
        FLOPs by part.
    """
    if known is None:
        known = {}
    with torch.device("meta"):
        fused, fusion_flops = _fuse(model, size)
        image_tokens = fused.tokens.shape[1]
        length = image_tokens + TEXT_TOKENS
        # Not kept in `known`: the fusion is what differs between strategies.
        counted = {"fusion": fusion_flops}

        if "vision" in parts:
            tower = model.vision_tower
            # Blocks above the deepest selected layer are cut, so that towers differ in depth.
            key = ("vision", max(tower.layers), length)
            if key not in known:
                known[key] = _count_flops(
                    partial(tower, torch.empty(1, 3, size, size)),
                    tower.family.blocks(tower.tower),
                )
            counted["vision"] = known[key]

        if "llm" in parts:
            # Only what is injected makes the LLM's own work depend on the strategy.
            injected = ""
            if fused.memory:
                injected = f"{model.fusion.config} {model.config.vision_groups}"
            key = ("llm", injected, length)
            if key not in known:
                known[key] = _llm_flops(model, fused, length)
            counted["llm"] = known[key]
    return counted


def _llm_flops(model: FusionVLM, fused: Fused, length: int) -> int:
    """FLOPs of the LLM with what is injected into it, on one row of `length` tokens.

    Raises:
        LayerfuseError: the LLM cannot run on the meta device, or nothing can be injected into it.
    """
    plain_blocks = []
    for index, block in enumerate(decoder_blocks(model.language_model)):
        if index not in fused.memory:
            plain_blocks.append(block)
    # Where the image stands in the row does not change the number of products.
    text_mask = torch.zeros(1, length, dtype=torch.bool)
    placed = model.fusion.place(fused, Layout.of(text_mask, 1, fused.tokens.shape[1]))
    try:
        return _count_flops(partial(_read, model, placed, length), plain_blocks)
    # What an LLM that looks at numbers, or takes no embeddings, says on the meta device.
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        model_type = model.config.text_config.model_type
        raise LayerfuseError(
            f"the FLOPs of an LLM of type {model_type!r} cannot be counted: it does not run on "
            f"embeddings alone, without weights ({type(error).__name__}: {error}); valid are LLMs "
            "of the usual build, such as llama, qwen3, mistral, gemma3_text, phi3 and mixtral"
        ) from error


def _fuse(model: FusionVLM, size: int) -> tuple[Fused, int]:
    """Run the fusion strategy on features of one image.

    Args:
        model: a model on the meta device.
        size: height and width of the image in pixels.

    Returns:
        What the strategy makes of the image, and the FLOPs of that.
    """
    tower = model.vision_tower
    rows, columns = tower.grid(size, size)
    patches = torch.empty(1, rows * columns, model.config.vision_config.hidden_size)
    summary = patches[:, 0]
    depth = len(tower.layers)
    features = Features(tower.layers, (patches,) * depth, (summary,) * depth, (rows, columns))
    instruction_width = model.instruction.width(model.config.text_config.hidden_size)
    instruction = torch.empty(1, instruction_width)
    with FlopCounterMode(display=False) as counter:
        fused = model.fusion(features, instruction)
    return fused, counter.get_total_flops()


def _read(model: FusionVLM, placed: Placed, length: int) -> None:
    """Run the LLM on one row of `length` tokens with the image in it."""
    model.language_model(
        inputs_embeds=torch.empty(1, length, model.config.text_config.hidden_size),
        # A finished mask, so that transformers makes none, which the meta device cannot.
        attention_mask=torch.zeros(1, 1, length, length),
        # Else opt would count the positions in the mask.
        position_ids=torch.arange(length)[None],
        visual=placed,
        use_cache=False,
    )


@dataclass(frozen=True)
class MeasuredBlock:
    """One run of a block of a tower or of an LLM."""

    output: Any
    """what the block returned: a meta tensor, or whatever that build of transformers returns"""
    flops: int


class BlockRepeats:
    """Runs one block of each kind, and repeats its output and its FLOPs for the others.

    A tower has up to 40 blocks of one shape, and a run on the meta device takes as long for every
    one of them.

    Attributes:
        measured: the first run of each kind.
        skipped_flops: FLOPs of the blocks that were not run, which no counter saw.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.measured: dict[Hashable, MeasuredBlock] = {}
        self.skipped_flops = 0

    def run(self, forward: Callable[..., Any], kind: Hashable, *args: Any, **kwargs: Any) -> Any:
        """Stand in for `forward` of a block of a kind; takes what it takes."""
        if kind in self.measured:
            earlier = self.measured[kind]
            self.skipped_flops += earlier.flops
            return earlier.output
        before = self.counter.get_total_flops()
        output = forward(*args, **kwargs)
        self.measured[kind] = MeasuredBlock(output, self.counter.get_total_flops() - before)
        return output


def _kind_of(block: nn.Module) -> Hashable:
    """What blocks of equal FLOPs have in common, if nothing is injected into them."""
    # Only families that mix full and sliding attention, such as gemma3, say which a block has.
    shapes = tuple((name, weight.shape) for name, weight in block.named_parameters())
    return type(block), vars(block).get("attention_type"), shapes


def _count_flops(action: Callable[[], object], blocks: Iterable[nn.Module]) -> int:
    """FLOPs of the forward pass of a tower or of an LLM on one sequence.

    Args:
        action: the forward pass.
        blocks: the blocks that do nothing but their own work: nothing is injected into them.

    Returns:
        The same number as if every block ran.
    """
    with FlopCounterMode(display=False) as counter, ExitStack() as stack:
        repeats = BlockRepeats(counter)
        for block in blocks:
            # An attribute of the instance hides the method until it is deleted.
            block.forward = partial(repeats.run, block.forward, _kind_of(block))
            stack.callback(delattr, block, "forward")
        action()
    return counter.get_total_flops() + repeats.skipped_flops


def vision_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration of an encoder, checked as it is for training.

    Args:
        source: the encoder.

    Returns:
        The configuration of the vision tower.

    Raises:
        LayerfuseError: it cannot be found, or is no vision encoder.
    """
    return load_vision_config(source.model, source.config)


def text_config(source: ModelSource, blocks: int | None = None) -> PreTrainedConfig:
    """The configuration of a language model, checked as it is for training.

    Args:
        source: the language model.
        blocks: number of its first blocks that are kept; None: all.

    Returns:
        Its configuration.

    Raises:
        LayerfuseError: it cannot be found, is more than a language model, or cannot be cut.
    """
    return text_config_of(source.model, source.config, blocks)
