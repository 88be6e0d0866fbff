"""The small interface behind every fusion strategy, and how internal fusion reaches the LLM."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, PositiveFloat
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn

from layerfuse.encoder import Features
from layerfuse.layers import Normalization, Projector, Standardize, normalization
from layerfuse.registry import Registry
from layerfuse.selection import Selection, resolve_layer

OPTIONS = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@validated(frozen=True, config=OPTIONS)
class StrategyConfig:
    """Options that every strategy has."""

    normalize: Normalization = "none"
    """How each layer's patch tokens are normalised before fusion: `none` as published, `layernorm`
    learned per layer, `standardize` per channel with statistics measured once before training and
    stored in the model. Token norms differ by a factor of 50 between layers."""
    token_scale: PositiveFloat | None = None
    """Scale what each projector writes so that its standard deviation is this multiple of that of
    the LLM's text embeddings, measured once before training and stored in the model. None, as
    published, leaves it at its random initialisation. Large tokens outlive the LLM's first blocks:
    short trainings learn faster with 10."""

    def resolve(self, selection: Selection) -> "StrategyConfig":
        """The same options with every layer index resolved and checked against the encoder."""
        return self

    def taps(self, selection: Selection) -> tuple[int, ...]:
        """The layers that the encoder must give, ascending."""
        return tuple(sorted(selection.layers))


@validated(frozen=True, config=OPTIONS)
class BaseLayerConfig(StrategyConfig):
    """Options of the strategies that add layers to a base layer."""

    base: int = -2
    """The layer that carries the ordinary visual tokens; -2 is LLaVA's choice."""

    def resolve(self, selection: Selection) -> "BaseLayerConfig":
        return replace(self, base=resolve_layer(self.base, selection.depth))

    def taps(self, selection: Selection) -> tuple[int, ...]:
        return tuple(sorted({*selection.layers, self.base}))


@dataclass(frozen=True)
class Shapes:
    """What a strategy must know of its surroundings."""

    selection: Selection
    vision_width: int
    llm_width: int
    llm_depth: int


@dataclass(frozen=True)
class Visual:
    """What a fusion strategy gives to the LLM.

    tokens  (B, N', D) replace the image tokens
    memory  {LLM block: (B, N', *)} is injected before that block
    mask    (rows, T) image positions in the prompt; None while decoding
    notes   {name: tensor} weights and gates, for losses and figures
    """

    tokens: Tensor
    memory: dict[int, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)


class Fusion(nn.Module):
    """Base of all strategies: features of the selected layers in, `Visual` out.

    A subclass sets `kind` and `paper`, and implements `forward`. It owns its projectors. Internal
    strategies also fill `Visual.memory` and implement `inject`; those that change the number of
    tokens override `num_tokens`.
    """

    kind: ClassVar[str]
    paper: ClassVar[str]

    def __init__(self, config: Any, shapes: Shapes) -> None:
        super().__init__()
        self.config = config
        self.shapes = shapes
        self.norms = nn.ModuleDict(
            {
                str(k): normalization(config.normalize, shapes.vision_width)
                for k in config.taps(shapes.selection)
            }
        )

    @classmethod
    def num_tokens(cls, config: Any, grid: tuple[int, int]) -> int:
        """Number of visual tokens that replace one image of that patch grid."""
        return grid[0] * grid[1]

    def forward(self, features: Features) -> Visual:
        """Features of B images -> what the LLM gets."""
        raise NotImplementedError

    def inject(self, block: int, hidden: Tensor, visual: Visual) -> Tensor:
        """(rows, T, D) input of LLM block `block` -> the same with the visual memory added."""
        raise NotImplementedError

    def normalized(self, features: Features, layers: Iterable[int]) -> list[Tensor]:
        """The normalised patch tokens of `layers`: one (B, N, Dv) each."""
        layers = list(layers)
        return [self.norms[str(k)](x) for k, x in zip(layers, features.select(layers), strict=True)]

    def reset_parameters(self) -> None:
        """Random initialisation of the whole strategy: PyTorch's defaults, as in LLaVA."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()

    @torch.no_grad()
    def calibrate(self, features: Features, embedding_std: float) -> None:
        """Measure the stored constants: channel statistics (`standardize`) and the projectors'
        output scales (`token_scale`), from the features of some training images."""
        for layer, patches in zip(features.layers, features.patches, strict=True):
            norm = self.norms[str(layer)]
            if isinstance(norm, Standardize):
                flat = patches.float().flatten(0, 1)
                norm.mean.copy_(flat.mean(dim=0))
                norm.std.copy_(flat.std(dim=0).clamp_min(1e-6))
        if self.config.token_scale is None:
            return
        target = self.config.token_scale * embedding_std
        projectors = [m for m in self.modules() if isinstance(m, Projector)]
        handles = [m.register_forward_hook(_rescale_to(target)) for m in projectors]
        self(features)
        for handle in handles:
            handle.remove()


def _rescale_to(target: float) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        module.get_buffer("scale").mul_(target / output.std().clamp_min(1e-12))

    return hook


def place(memory: Tensor, mask: Tensor) -> Tensor:
    """(B, N, D) visual memory -> (rows, T, D), zero where `mask` (rows, T) is false.

    Images come in reading order: row by row, left to right.
    """
    dense = memory.new_zeros(*mask.shape, memory.shape[-1])
    return dense.masked_scatter(mask.unsqueeze(-1), memory)


class Injector:
    """Pre-hook of one decoder block: takes `visual` out of the block's keyword arguments and lets
    the strategy change the block's input. Holds no state of its own."""

    def __init__(self, fusion: Fusion, block: int) -> None:
        self.fusion = fusion
        self.block = block

    def before_block(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        visual: Visual | None = kwargs.pop("visual", None)
        if visual is None or self.block not in visual.memory:
            return args, kwargs
        return (self.fusion.inject(self.block, args[0], visual), *args[1:]), kwargs


def attach(fusion: Fusion, blocks: nn.ModuleList) -> None:
    """Let `fusion` see the input of every decoder block. Call once, when the model is built."""
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(Injector(fusion, index).before_block, with_kwargs=True)


def descriptions(config: type[StrategyConfig]) -> dict[str, str]:
    """{option: its description}, own and inherited, as written where each is declared."""
    return {
        name: field.description or ""
        for base in reversed(config.__mro__)
        for name, field in vars(base).get("__pydantic_fields__", {}).items()
        if field.description
    }


FUSIONS: Registry[StrategyConfig, Fusion] = Registry("fusion strategy")
register = FUSIONS.register
