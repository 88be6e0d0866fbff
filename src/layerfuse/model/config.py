"""From an encoder and an LLM to a FusionVLM: its configuration, its LLM, its processor."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
from transformers import AutoConfig, PreTrainedConfig

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS, Shapes, Strategy, parse
from layerfuse.vision.encoder import patch_grid
from layerfuse.vision.selection import LayerSpec, Selection, select
from layerfuse.vision.towers import family_of, native_size, patch_side


@dataclass(frozen=True)
class ImageTokens:
    """The one place that counts the tokens that an image becomes."""

    strategy: Strategy
    """the fusion strategy, which may add or pool tokens"""
    layers: int
    """number of selected layers"""
    patch_size: int
    """pixels of a patch, both ways"""
    token_grid: Sequence[int] | None
    """(rows, columns) to which patches are pooled; None: no pooling"""

    def of_grid(self, grid: tuple[int, int]) -> int:
        """Tokens of an image.

        Args:
            grid: (rows, columns) of the patches in the image's features.
        """
        return self.strategy.num_tokens(grid, self.layers)

    def of_pixels(self, height: int, width: int) -> int:
        """Tokens of a preprocessed image of that many pixels.

        Raises:
            LayerfuseError: if the token grid has more rows or columns than the image has patches.
        """
        patch_rows, patch_columns = patch_grid(height, width, self.patch_size)
        if not self.token_grid:
            return self.of_grid((patch_rows, patch_columns))
        rows, columns = self.token_grid
        # Pooling to more tokens than patches would only repeat patches.
        if rows > patch_rows or columns > patch_columns:
            raise LayerfuseError(
                f"token_grid {[rows, columns]} is larger than the {patch_rows} x {patch_columns} "
                f"patches of pictures of {height} x {width} pixels; valid: up to {patch_rows} rows "
                f"and {patch_columns} columns"
            )
        return self.of_grid((rows, columns))


def image_tokens_of(
    fusion: dict[str, Any] | None,
    *,
    layers: int,
    patch_size: int,
    token_grid: Sequence[int] | None,
) -> ImageTokens:
    """What counts the tokens of an image, from the fields of a saved model or processor.

    Args:
        fusion: as for `strategy_of`.
        layers: number of selected layers.
        patch_size: pixels of a patch, both ways.
        token_grid: (rows, columns) to which patches are pooled; None: no pooling.

    Raises:
        LayerfuseError: for unknown strategies and options.
    """
    return ImageTokens(
        strategy_of(fusion),
        layers=layers,
        patch_size=patch_size,
        token_grid=token_grid,
    )


def strategy_of(fusion: dict[str, Any] | None) -> Strategy:
    """A strategy with its validated options, from the field of a saved model or processor.

    Args:
        fusion: the name and the options; None is `single`, for configs without fields, which
            transformers makes to compare others with them.

    Raises:
        LayerfuseError: for unknown strategies and options.
    """
    # As text, because a dict cannot be a key of a cache, and may be changed by whoever holds it.
    text = json.dumps(fusion or {"name": "single"}, default=str)
    return _parsed(text, tuple(FUSIONS.items()))


# The registered strategies are part of the key: a notebook may register a changed one again.
@lru_cache
def _parsed(text: str, registered: Any) -> Strategy:
    """The strategy that a text describes; the same object each time that it is asked for."""
    return parse(json.loads(text))


def resolve_strategy(fusion: dict[str, Any], selection: Selection) -> Strategy:
    """A recipe's strategy, whose options name the layers of this encoder.

    Args:
        fusion: the strategy in recipe form.
        selection: the selected layers, and the depth of the encoder.

    Raises:
        LayerfuseError: for unknown strategies and options, and layers that do not exist.
    """
    strategy = parse(fusion)
    return replace(strategy, options=strategy.options.resolve(selection))


class FusionConfig(PreTrainedConfig):
    """Composite configuration; every layer index in it is resolved."""

    model_type = "layerfuse"
    # what `Trainer.evaluate` need not gather from processes
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "visual"]
    # a property in newer versions of transformers, a dictionary in those that servers ask for
    sub_configs: ClassVar = {  # pyright: ignore
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
    }

    # Any: a config of any family, whose fields transformers names in no common type
    vision_config: Any = None
    """the encoder's own config, at full depth"""
    text_config: Any = None
    """the LLM's own config"""
    vision_groups: list[list[int]] | None = None
    """selected layers, as groups; a plain list of layers is one group per layer"""
    fusion: dict[str, Any] | None = None
    """the strategy and its options: {"name": "concat", ...}"""
    token_grid: list[int] | None = None
    """(rows, columns) to which every layer's patch tokens are average-pooled; none: no pooling"""
    image_token_id: int = 0
    """the token that stands in `input_ids` where a visual token belongs"""
    tie_word_embeddings: bool = False
    answer_tokens: list[int] | None = None
    """the tokens that answers are made of, where they are a closed set; none: any token"""

    # Any: what else transformers makes of a config
    def __post_init__(self, **others: Any) -> None:
        """Make the configs of encoder and LLM of what was saved, or where they are left out."""
        self.vision_config = _inner_config(self.vision_config, "clip_vision_model")
        self.text_config = _inner_config(self.text_config, "llama")
        # Any: transformers does not annotate what it runs after a config is made
        parent: Any = super()
        parent.__post_init__(**others)

    @property
    def selection(self) -> Selection:
        """The selected layers, in groups, and the depth of the whole encoder."""
        depth: int = self.vision_config.num_hidden_layers
        if not self.vision_groups:
            # a config without fields, which transformers makes to compare others with it
            return Selection(((depth,),), depth)
        groups = tuple(tuple(group) for group in self.vision_groups)
        return Selection(groups, depth)

    @property
    def vision_layers(self) -> list[int]:
        """The selected layers, in the order in which the strategy takes them."""
        return list(self.selection.layers)

    @property
    def strategy(self) -> Strategy:
        """The fusion strategy with its validated options."""
        return strategy_of(self.fusion)

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers that the encoder must give, ascending: the selected ones and the base."""
        return self.strategy.options.taps(self.selection)

    @property
    def image_tokens(self) -> ImageTokens:
        """How many tokens an image becomes."""
        return image_tokens_of(
            self.fusion,
            layers=len(self.vision_layers),
            patch_size=patch_side(self.vision_config),
            token_grid=self.token_grid,
        )

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens that replace one preprocessed image of that many pixels."""
        return self.image_tokens.of_pixels(height, width)


# Any: a config of any family, or what is saved of one
def _inner_config(given: Any, default: str) -> Any:
    """The config of a part of the model.

    Args:
        given: the config, the dictionary that was saved of it, or None.
        default: the `model_type` where none is said.
    """
    settings: dict[str, Any] = {}
    if isinstance(given, dict):
        settings.update(cast("dict[str, Any]", given))
    elif given is not None:
        return given
    model_type = settings.pop("model_type", default)
    # Any: transformers does not annotate what its automatic classes make
    auto_config: Any = AutoConfig
    return auto_config.for_model(model_type, **settings)


def configure(
    vision: PreTrainedConfig,
    text: PreTrainedConfig,
    layers: LayerSpec,
    fusion: dict[str, Any],
    *,
    token_grid: tuple[int, int] | None = None,
    image_token_id: int = 0,
) -> FusionConfig:
    """Resolve layers and options against an encoder and an LLM, before any weight is loaded.

    Args:
        vision: the encoder's config.
        text: the LLM's config.
        layers: the layers to take, in any form that `select` knows.
        fusion: the strategy in recipe form.
        token_grid: (rows, columns) to which patches are pooled; None: no pooling.
        image_token_id: the token that visual tokens replace.

    Raises:
        LayerfuseError: for unknown strategies and options, layers that do not exist, and options
            that do not fit this encoder or this LLM.
    """
    selection = select(layers, vision.num_hidden_layers)
    strategy = resolve_strategy(fusion, selection)

    # these raise where the options do not fit the grid, the encoder or the LLM
    strategy.num_tokens(_grid(vision, token_grid), len(selection.layers))
    # the constructor checks what only it can know; on the meta device it costs no memory
    with torch.device("meta"):
        strategy.build(shapes(selection, vision, text))

    pooled = None
    if token_grid is not None:
        # lists, as JSON gives them back
        pooled = list(token_grid)
    return FusionConfig(
        vision_config=vision,
        text_config=text,
        vision_groups=[list(group) for group in selection.groups],
        fusion={"name": strategy.name, **asdict(strategy.options)},
        token_grid=pooled,
        image_token_id=image_token_id,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _grid(vision: PreTrainedConfig, token_grid: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) of the tokens of an image of the encoder's own size."""
    if token_grid is not None:
        if len(token_grid) != 2 or min(token_grid) < 1:
            raise LayerfuseError(
                f"token_grid {token_grid} must be (rows, columns), both at least 1"
            )
        return token_grid
    return patch_grid(*native_size(vision), patch_side(vision))


def shapes(selection: Selection, vision: PreTrainedConfig, text: PreTrainedConfig) -> Shapes:
    """The surroundings of a strategy, as the configurations say.

    Args:
        selection: the selected layers.
        vision: the config of an encoder.
        text: the config of any LLM.
    """
    # as a dict: not every LLM has heads or an MLP, and attributes of configs may be renamed
    settings = text.to_dict()
    return Shapes(
        selection,
        vision_width=vision.hidden_size,
        llm_width=text.hidden_size,
        llm_depth=text.num_hidden_layers,
        llm_heads=settings.get("num_attention_heads"),
        llm_ffn=settings.get("intermediate_size"),
        llm_family=text.model_type,
        has_cls=family_of(vision).prefix(vision) > 0,
    )
