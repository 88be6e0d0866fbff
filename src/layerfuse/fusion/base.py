"""The small interface behind every fusion strategy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import (
    Any,
    ClassVar,
    Generic,
    Literal,
    NoReturn,
    Self,
    TypeVar,
    dataclass_transform,
)

import torch
from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat, model_validator
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.blocks import (
    CALIBRATED,
    Normalization,
    OwnInit,
    Projector,
    Standardize,
    drawn_for,
    normalization,
)
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.fusion.visual import Fused, Guidance, Layout, Placed
from layerfuse.fusion.whitening import TokenMoments, Whiten
from layerfuse.vision.features import Features
from layerfuse.vision.selection import LayerSpec, Selection, resolve_layer

OPTIONS = ConfigDict(
    extra="forbid",
    use_attribute_docstrings=True,
    allow_inf_nan=False,
)
"""how pydantic reads options: the docstring of an attribute describes it, unknown names fail"""

CALIBRATION_CHUNK = 32
"""pictures whose tokens are copied to float64 at once"""
LARGEST_SEED = 2**62
"""below which a seed is drawn where none is given"""
SHRINKAGE = 1.0
"""of whitening, where none is given"""
PUBLISHED_DEPTH = 24
"""blocks of CLIP-L, the encoder in whose layers the papers' choices are written"""

Config = TypeVar("Config")


@dataclass_transform(frozen_default=True)
def options(config: type[Config]) -> type[Config]:
    """Make a class the validated options of a strategy, described by their docstrings."""
    # Any: pydantic wraps the class in a type of its own, which behaves as the class itself
    make_dataclass: Any = validated(frozen=True, config=OPTIONS)
    return make_dataclass(config)


@options
class StrategyConfig:
    """Options that every strategy has."""

    normalize: Normalization = "none"
    """How each layer's patch tokens are normalised before fusion: `none` as published, `layernorm`
    learned per layer, `standardize` per channel with statistics measured once before training and
    stored in the model, `whiten` per channel and then over all directions of the layer, with
    statistics measured likewise. Token norms differ by a factor of 50 between layers, and some
    layers keep half of their variance in one direction, along which alone a short training learns:
    then `whiten` reaches the plateau in a third of the steps. It needs a frozen encoder."""
    shrinkage: NonNegativeFloat = SHRINKAGE
    """For `normalize: whiten` alone: ρ of W = U diag(λ + ρ · mean λ)^(-1/2) Uᵀ, where C = U diag(λ)
    Uᵀ is the covariance of the standardised tokens. A larger one amplifies small directions less;
    0 whitens exactly, and needs more tokens than channels."""
    token_scale: PositiveFloat | None = None
    """Scale what each projector writes so that its standard deviation is this multiple of that of
    the LLM's text embeddings, measured once before training and stored in the model. None, as
    published, leaves it at its random initialisation. Large tokens outlive the LLM's first blocks:
    short trainings learn faster with 10."""

    @model_validator(mode="after")
    def check_shrinkage(self) -> Self:
        """Refuse a shrinkage of what is not whitened."""
        if self.shrinkage != SHRINKAGE and self.normalize != "whiten":
            raise ValueError(
                f"shrinkage {self.shrinkage:g} belongs to normalize: whiten, and this is "
                f"normalize: {self.normalize}; whiten, or leave shrinkage out (an arm that does "
                f"not whiten takes back that of fusion_defaults with shrinkage: {SHRINKAGE:g})"
            )
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the strategy has constants that are measured before training."""
        return self.normalize in CALIBRATED or self.token_scale is not None

    @property
    def guided_by_turn(self) -> bool:
        """Whether a guided strategy trains one row per answer, guided by its own question; else a
        conversation is one row, guided by the mean of its questions."""
        return True

    def resolve(self, selection: Selection) -> Self:
        """The same options with every layer index resolved and checked against the encoder.

        Args:
            selection: the selected layers, and the depth of the encoder.

        Raises:
            LayerfuseError: if a layer does not exist, or the options do not fit the selection.
        """
        return self

    def taps(self, selection: Selection) -> tuple[int, ...]:
        """The layers that the encoder must give, ascending."""
        return tuple(sorted(selection.layers))


@options
class BaseLayerConfig(StrategyConfig):
    """Options of the strategies that add layers to a base layer."""

    base: int = -2
    """The layer that carries the ordinary visual tokens; -2 is LLaVA's choice."""

    def resolve(self, selection: Selection) -> Self:
        # -2 means another layer in every encoder: a stored config must not depend on its depth
        return replace(self, base=resolve_layer(self.base, selection.depth))

    def taps(self, selection: Selection) -> tuple[int, ...]:
        # the base layer may be a selected one too, and is encoded once
        return tuple(sorted({*selection.layers, self.base}))


Options = TypeVar("Options", bound=StrategyConfig)
Module = TypeVar("Module", bound="Fusion[Any]")


@dataclass(frozen=True)
class Shapes:
    """What a strategy must know of its surroundings.

    `llm_heads`, `llm_ffn` and `llm_family` are only read by strategies that work inside the LLM.
    """

    selection: Selection
    vision_width: int
    """channels of a patch token, Dv"""
    llm_width: int
    """channels of the LLM's embeddings, D"""
    llm_depth: int
    """number of the LLM's blocks"""
    llm_heads: int | None = None
    """attention heads of the LLM; None where its config names none"""
    llm_ffn: int | None = None
    """width inside the LLM's MLP; None where its config names none"""
    llm_family: str = "llama"
    """the LLM's `model_type`"""
    has_cls: bool = True
    """whether the encoder has a CLS token"""


class Fusion(nn.Module, Generic[Options]):
    """Base of all strategies: features of the selected layers in, `Fused` out.

    A subclass sets `kind`, `paper` and `published`, and has a `forward` and projectors. Internal
    strategies also fill `Fused.memory` and implement `addition`; those that change the number of
    tokens override `num_tokens`; guided ones set `reads` and derive from `GuidedFusion`.

    Args:
        config: the strategy's options, with resolved layers.
        shapes: what the encoder and the LLM are like.
    """

    kind: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str] = ""
    """what it does in a few words, as the README's table says it"""
    published: ClassVar[tuple[int, ...] | str] = (8, 16)
    """its paper's layers of an encoder of 24 blocks, or a specification for every depth"""
    reads: ClassVar[Literal["nothing", "sentence", "prompt"]] = "nothing"
    """the instruction that `forward` wants: none, (B, E) sentence embeddings of the question, or
    (B, D) means of the LLM's embeddings of the prompt"""
    attends: ClassVar[bool] = False
    """whether decoded tokens too look at the memory, and not only at the KV cache"""
    position: str = "pre"
    """where in an LLM block `addition` is added: see `layerfuse.fusion.injector`"""

    def __init__(self, config: Options, shapes: Shapes) -> None:
        super().__init__()
        self.config = config
        self.shapes = shapes
        # ModuleDict wants names
        self.norms = nn.ModuleDict()
        for layer in config.taps(shapes.selection):
            self.norms[str(layer)] = normalization(config.normalize, shapes.vision_width)

    @classmethod
    def example(cls, depth: int) -> LayerSpec:
        """The published layers, or as many as there are at their relative depths.

        Args:
            depth: number of the encoder's blocks.

        Returns:
            A layer specification for such an encoder, without repetitions.
        """
        if isinstance(cls.published, str):
            return cls.published
        layers: list[int] = []
        for published in cls.published:
            layer = max(1, round(published * depth / PUBLISHED_DEPTH))
            # in a shallow encoder several published layers fall on the same one
            if layer not in layers:
                layers.append(layer)
        return layers

    @classmethod
    def num_tokens(cls, config: Options, grid: tuple[int, int], layers: int) -> int:
        """Visual tokens that replace an image.

        Args:
            config: the strategy's options.
            grid: (rows, columns) of the image's patches.
            layers: number of selected layers.

        Raises:
            LayerfuseError: if the options do not fit such a grid.
        """
        return grid[0] * grid[1]

    @classmethod
    def cover(cls, config: Options, grid: tuple[int, int], layers: int) -> Tensor:
        """Which cells of the grid each visual token stands for, for figures.

        Args:
            config: the strategy's options.
            grid: (rows, columns) of the image's patches.
            layers: number of selected layers.

        Returns:
            (N', rows · columns), each row summing to one.
        """
        return torch.eye(grid[0] * grid[1])

    def openings(self) -> dict[str, float]:
        """How far each learned gate is open, by what it lets through; 0 is closed."""
        return {}

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

        Returns:
            The tokens (B, N', D) of the images, and for internal strategies their memory.
        """
        raise NotImplementedError

    def addition(self, block: int, hidden: Tensor, visual: Placed) -> Tensor:
        """What internal strategies add to the hidden states of an LLM block, at `position`.

        Args:
            block: 0-based index of the block.
            hidden: (rows, T, D)
            visual: the images, arranged by rows.

        Returns:
            A tensor that broadcasts to (rows, T, D).
        """
        raise NotImplementedError

    def place(self, fused: Fused, layout: Layout) -> Placed:
        """Arrange what was made of B images by rows of the prompt, once per prompt.

        Args:
            fused: what `forward` gave.
            layout: where the images stand.
        """
        memory = self.arrange(fused.memory, layout)
        return Placed(fused, memory, layout.mask, layout.seen_images(), self.addition)

    def arrange(self, memory: dict[int, Tensor], layout: Layout) -> dict[int, Tensor]:
        """The memory as `addition` reads it; strategies that attend arrange it by rows.

        Args:
            memory: {LLM block: (B, N, *)}
            layout: where the images stand.
        """
        return memory

    def penalty(self, fused: Fused) -> Tensor | None:
        """A term of the training loss where the instruction guides, if the strategy has one.

        Args:
            fused: what `forward` gave.

        Returns:
            A scalar; None for no term.
        """
        return None

    def normalized(self, features: Features, layers: Sequence[int]) -> list[Tensor]:
        """The normalised patch tokens of some layers.

        Args:
            features: the features of B images.
            layers: layers that the encoder gave, in any order.

        Returns:
            One (B, N, Dv) tensor per entry of `layers`.
        """
        tokens: list[Tensor] = []
        for layer, patches in zip(layers, features.select(layers), strict=True):
            tokens.append(self.norms[str(layer)](patches))
        return tokens

    def group_means(self, features: Features) -> list[Tensor]:
        """The mean of the normalised layers of each selected group: one (B, N, Dv) each."""
        means: list[Tensor] = []
        for group in self.shapes.selection.groups:
            # (layers of the group, B, N, Dv) -> (B, N, Dv)
            stacked = torch.stack(self.normalized(features, group))
            means.append(stacked.mean(dim=0))
        return means

    def reset_parameters(self, seed: int | None = None) -> None:
        """Random initialisation of the whole strategy: PyTorch's defaults, as in LLaVA, zeros for
        the strategy's own parameters, then what its parts set.

        Each part draws from a generator of its own, so that equally named parts of equal shape
        begin alike in all strategies: arms of one seed then differ by what is compared alone.

        Args:
            seed: of the draws, which are made where the parameters are, on the CPU. None draws a
                seed from torch's generator.
        """
        if seed is None:
            # by name: models are made on the meta device when they load, where nothing has a value
            seed = int(torch.randint(LARGEST_SEED, (), device="cpu"))
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)
        # Any: torch leaves the method untyped
        named_modules: Any = self.named_modules
        parts: list[tuple[str, nn.Module]] = list(named_modules())
        for name, module in parts:
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm):
                with drawn_for(name, seed):
                    module.reset_parameters()
        # last: a part may change what its Linears have by default
        for name, module in parts:
            if isinstance(module, OwnInit):
                with drawn_for(name, seed):
                    module.reset_parameters()

    def begin_as(self, given: FlatProjector) -> None:
        """Make the tokens those of a given projector, to which new layers add nothing at first.

        Args:
            given: the projector of a trained model.

        Raises:
            LayerfuseError: if the strategy cannot begin so; with the reason.
        """
        raise LayerfuseError(
            f"{type(self).__name__} cannot begin as a given model: what it does to the layers "
            "cannot be switched off. Valid are strategies that put new layers beside the given "
            "one, such as concat, or behind a closed gate, such as inject_cross"
        )

    def begin_projector(
        self, projector: Projector, given: FlatProjector, parts: dict[int, int]
    ) -> None:
        """Let a projector begin as a given one, for `begin_as`.

        Args:
            projector: one of the strategy's own.
            given: the projector of a trained model.
            parts: {layer: the part of the projector's input that is this layer and nothing else}

        Raises:
            LayerfuseError: if a layer of `given` is no such part, or is changed before it.
        """
        if self.config.normalize != "none" or self.config.token_scale is not None:
            raise LayerfuseError(
                "a fusion that begins as a given model takes its layers as they are: leave out "
                "`normalize` and `token_scale`"
            )
        missing = [layer for layer in given.layers if layer not in parts]
        if missing:
            raise LayerfuseError(
                f"the given model looks at layers {list(given.layers)}, of which "
                f"{type(self).__name__} does not put {missing} before its projector as they are "
                f"(only {sorted(parts)}): set `base`, or the layers, to those of the given model"
            )
        projector.begin_as(given, [parts[layer] for layer in given.layers])

    @torch.no_grad()
    def calibrate(self, features: Features, embedding_std: float) -> None:
        """Measure the stored constants: statistics of each layer's tokens (`standardize`,
        `whiten`) and the projectors' output scales (`token_scale`).

        Args:
            features: the features of some training images.
            embedding_std: standard deviation of the LLM's text embeddings.

        Raises:
            LayerfuseError: if a layer cannot be whitened; it is named.
        """
        # the statistics first: they change what the projectors get
        self._measure_channels(features)
        if self.config.token_scale is not None:
            self._scale_projectors(features, self.config.token_scale * embedding_std)

    def _measure_channels(self, features: Features) -> None:
        """Set the statistics of every layer that is standardised or whitened."""
        for layer, patches in zip(features.layers, features.patches, strict=True):
            norm = self.norms[str(layer)]
            if isinstance(norm, Standardize):
                # (B, N, Dv) -> (B · N, Dv); sums over many tokens need float32
                tokens = patches.float().flatten(0, 1)
                norm.mean.copy_(tokens.mean(dim=0))
                # a channel that never changes would be divided by zero
                norm.std.copy_(tokens.std(dim=0).clamp_min(1e-6))
            elif isinstance(norm, Whiten):
                moments = _moments(patches)
                try:
                    norm.measure(moments, self.config.shrinkage)
                except LayerfuseError as error:
                    raise LayerfuseError(f"normalize: whiten, layer {layer}: {error}") from error

    def _scale_projectors(self, features: Features, target: float) -> None:
        """Let the output of every projector have the standard deviation `target`."""

        def rescale(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # the output was made with the scale so far, so the correction multiplies it
            correction = target / output.std().clamp_min(1e-12)
            module.get_buffer("scale").mul_(correction)

        handles: list[RemovableHandle] = []
        for module in self.modules():
            if isinstance(module, Projector):
                handles.append(module.register_forward_hook(rescale))
        try:
            # Pictures are measured without text, so nothing can guide.
            self(features, guidance="uniform")
        finally:
            # Left behind, they would rescale every later forward.
            for handle in handles:
                handle.remove()


def _moments(patches: Tensor) -> TokenMoments:
    """The moments of the tokens (B, N, Dv) of B images."""
    # a float64 copy of all images at once may not fit into memory
    moments = TokenMoments.of(patches[:CALIBRATION_CHUNK])
    for start in range(CALIBRATION_CHUNK, len(patches), CALIBRATION_CHUNK):
        chunk = TokenMoments.of(patches[start : start + CALIBRATION_CHUNK])
        moments = moments.joined(chunk)
    return moments


@dataclass(frozen=True)
class Strategy:
    """A fusion strategy with its validated options."""

    name: str
    """as registered, such as `concat`"""
    # Any: a subclass of StrategyConfig with fields of its own, which only `module` knows
    options: Any
    """the validated options"""
    module: type[Fusion[Any]]
    """the class that `build` makes an instance of"""

    def num_tokens(self, grid: tuple[int, int], layers: int) -> int:
        """Visual tokens that replace an image.

        Args:
            grid: (rows, columns) of the image's patches.
            layers: number of selected layers.

        Raises:
            LayerfuseError: if the options do not fit such a grid.
        """
        return self.module.num_tokens(self.options, grid, layers)

    def cover(self, grid: tuple[int, int], layers: int) -> Tensor:
        """Which cells of the grid each visual token stands for.

        Args:
            grid: (rows, columns) of the image's patches.
            layers: number of selected layers.

        Returns:
            (N', rows · columns), each row summing to one.
        """
        return self.module.cover(self.options, grid, layers)

    def build(self, shapes: Shapes) -> Fusion[Any]:
        """The module with random weights.

        Raises:
            LayerfuseError: if the options do not fit `shapes`.
        """
        return self.module(self.options, shapes)


class Registry(dict[str, tuple[type[StrategyConfig], type[Fusion[Any]]]]):
    """From the name of a strategy to its config class and its module class, as registered."""

    def register(
        self, name: str, config: type[StrategyConfig]
    ) -> Callable[[type[Module]], type[Module]]:
        """Class decorator: register the decorated module under `name` with its config class.

        Args:
            name: what a recipe calls the strategy.
            config: its options.

        Raises:
            LayerfuseError: if the name is taken by another class.
        """

        def add(module: type[Module]) -> type[Module]:
            if name in self:
                _, registered = self[name]
                # the same class again is a file that was imported twice, as notebooks do
                if registered.__qualname__ != module.__qualname__:
                    raise LayerfuseError(
                        f"fusion strategy {name!r} is already registered: {registered}"
                    )
            self[name] = (config, module)
            return module

        return add

    def __missing__(self, name: str) -> NoReturn:
        raise LayerfuseError(f"unknown fusion strategy {name!r}; valid: {', '.join(self)}")


FUSIONS = Registry()
register = FUSIONS.register
