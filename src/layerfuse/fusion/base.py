"""The small interface behind every fusion strategy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

import torch
from pydantic import ConfigDict, PositiveFloat
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn

from layerfuse.fusion.blocks import Normalization, OwnInit, Projector, Standardize, normalization
from layerfuse.fusion.visual import Fused, Guidance, Layout, Placed
from layerfuse.vision.features import Features
from layerfuse.vision.selection import LayerSpec, Selection, resolve_layer

OPTIONS = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
Config = TypeVar("Config")


@dataclass_transform(frozen_default=True)
def options(config: type[Config]) -> type[Config]:
    """Make a class the validated options of a strategy, described by their docstrings."""
    return validated(frozen=True, config=OPTIONS)(config)  # type: ignore[return-value]


@options
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


@options
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
    """What a strategy must know of its surroundings.

    `llm_heads`, `llm_ffn` (width inside its MLP) and `llm_family` (its `model_type`) are only read
    by strategies that work inside the LLM; `has_cls` says whether the encoder has a CLS token.
    """

    selection: Selection
    vision_width: int
    llm_width: int
    llm_depth: int
    llm_heads: int | None = None
    llm_ffn: int | None = None
    llm_family: str = "llama"
    has_cls: bool = True


class Fusion(nn.Module):
    """Base of all strategies: features of the selected layers in, `Fused` out.

    A subclass sets `kind`, `paper` and `published`, and has a `forward` and projectors. Internal
    strategies also fill `Fused.memory` and implement `addition`; those that change the number of
    tokens override `num_tokens`; guided ones set `reads` and derive from `GuidedFusion`.
    """

    kind: ClassVar[str]
    paper: ClassVar[str]
    published: ClassVar[tuple[int, ...] | str] = (8, 16)
    """its paper's layers of an encoder of 24 blocks, or a specification for every depth"""
    reads: ClassVar[Literal["nothing", "sentence", "prompt"]] = "nothing"
    """the instruction that `forward` wants: none, (B, E) sentence embeddings of the question, or
    (B, D) means of the LLM's embeddings of the prompt"""
    attends: ClassVar[bool] = False
    """whether decoded tokens too look at the memory, and not only at the KV cache"""
    position: str = "pre"
    """where in an LLM block `addition` is added: see `layerfuse.fusion.injector`"""

    def __init__(self, config: Any, shapes: Shapes) -> None:
        super().__init__()
        self.config = config
        self.shapes = shapes
        taps, width = config.taps(shapes.selection), shapes.vision_width
        self.norms = nn.ModuleDict({str(k): normalization(config.normalize, width) for k in taps})

    @classmethod
    def example(cls, depth: int) -> LayerSpec:
        """The published layers, or as many as there are at their relative depths in `depth`."""
        if isinstance(cls.published, str):
            return cls.published
        return list(dict.fromkeys(max(1, round(k * depth / 24)) for k in cls.published))

    @classmethod
    def num_tokens(cls, config: Any, grid: tuple[int, int], layers: int) -> int:
        """Visual tokens that replace an image of that patch grid when so many layers are taken."""
        return grid[0] * grid[1]

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        """Fuse the layers of B images.

        Args:
            features: the layers that `config.taps` names.
            instruction: (B, E), what `reads` names, for guided strategies.
            guidance: what weighs the layers of guided strategies; others ignore it.
        """
        raise NotImplementedError

    def addition(self, block: int, hidden: Tensor, visual: Placed) -> Tensor:
        """What is added to (rows, T, D) `hidden`, at `position` in LLM block `block`."""
        raise NotImplementedError

    def place(self, fused: Fused, layout: Layout) -> Placed:
        """Arrange what was made of B images by rows of the prompt, once per prompt."""
        memory = self.arrange(fused.memory, layout)
        return Placed(fused, memory, layout.mask, layout.seen_images())

    def arrange(self, memory: dict[int, Tensor], layout: Layout) -> dict[int, Tensor]:
        """The memory as `addition` reads it; strategies that attend arrange it by rows."""
        return memory

    def penalty(self, fused: Fused) -> Tensor | None:
        """A term of the training loss where the instruction guides, if the strategy has one."""
        return None

    def normalized(self, features: Features, layers: Sequence[int]) -> list[Tensor]:
        """The normalised patch tokens of `layers`: one (B, N, Dv) each."""
        return [self.norms[str(k)](x) for k, x in zip(layers, features.select(layers), strict=True)]

    def group_means(self, features: Features) -> list[Tensor]:
        """The mean of the normalised layers of each selected group: one (B, N, Dv) each."""
        groups = self.shapes.selection.groups
        return [torch.stack(self.normalized(features, group)).mean(dim=0) for group in groups]

    def reset_parameters(self) -> None:
        """Random initialisation of the whole strategy: PyTorch's defaults, as in LLaVA, zeros for
        the strategy's own parameters, then what its parts set."""
        for own in self.parameters(recurse=False):
            nn.init.zeros_(own)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, OwnInit):
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

        def rescale(module: nn.Module, inputs: Any, output: Tensor) -> None:
            module.get_buffer("scale").mul_(target / output.std().clamp_min(1e-12))

        projectors = [m for m in self.modules() if isinstance(m, Projector)]
        handles = [m.register_forward_hook(rescale) for m in projectors]
        # Pictures are measured without text, so nothing can guide.
        self(features, guidance="uniform")
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Strategy:
    """A fusion strategy with its validated options.

    name     as registered, such as `concat`
    options  the validated options
    module   the class that `build` makes an instance of
    """

    name: str
    options: Any  # a subclass of StrategyConfig with fields of its own, which `module` knows
    module: type[Fusion]

    def num_tokens(self, grid: tuple[int, int], layers: int) -> int:
        """Visual tokens that replace an image.

        Args:
            grid: (rows, columns) of the image's patches.
            layers: number of selected layers.

        Raises:
            ValueError: if the options do not fit such a grid.
        """
        return self.module.num_tokens(self.options, grid, layers)

    def build(self, shapes: Shapes) -> Fusion:
        """The module with random weights. Raises ValueError if the options do not fit `shapes`."""
        return self.module(self.options, shapes)


class Registry(dict[str, tuple[type[StrategyConfig], type[Fusion]]]):
    """From the name of a strategy to its config class and its module class, as registered."""

    def register(
        self, name: str, config: type[StrategyConfig]
    ) -> Callable[[type[Fusion]], type[Fusion]]:
        """Class decorator: register the decorated module under `name` with its config class.

        Raises ValueError if the name is taken by another class.
        """

        def add(module: type[Fusion]) -> type[Fusion]:
            if name in self and self[name][1].__qualname__ != module.__qualname__:
                raise ValueError(f"fusion strategy {name!r} is already registered: {self[name][1]}")
            self[name] = (config, module)
            return module

        return add

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"unknown fusion strategy {name!r}; valid: {', '.join(self)}")


FUSIONS = Registry()
register = FUSIONS.register
