"""How vision towers of transformers are put together: a table of families, and a look at others."""

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig

from layerfuse.errors import LayerfuseError, short

TRIED_BLOCKS = 3
"""blocks of the small tower with which an unknown family is tried"""


# Any: transformers names submodules and settings per family, in no common type
def _only_pixels(config: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """What most towers are called with."""
    return {"pixel_values": pixel_values}


def _as_patches(config: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """What SigLIP 2 of any shape (NaFlex) is called with: the patches of a grid without padding.

    Args:
        config: of the tower.
        pixel_values: (B, 3, height, width)
    """
    side: int = config.patch_size
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // side, width // side
    whole = pixel_values[:, :, : rows * side, : columns * side]
    cells = whole.reshape(batch, channels, rows, side, columns, side)
    # the channels of a pixel stand side by side: (B, rows · columns, side · side · 3)
    patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    device = pixel_values.device
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.long, device=device),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch, device=device),
    }


@dataclass(frozen=True)
class Family:
    """How a family of Hugging Face vision towers is put together."""

    # Any: transformers names submodules and settings per family, in no common type
    blocks: Callable[[Any], nn.ModuleList]
    """the blocks of a tower, from the bottom up"""
    prefix: Callable[[Any], int]
    """number of tokens before the patches, read from the config"""
    unused: tuple[str, ...] = ()
    """submodules after the last block, which layerfuse never runs"""
    resizes: bool = True
    """whether the embeddings must be told of images that are not of the native size"""
    norm: str | None = None
    """submodule between the embeddings and block 1"""
    whole: bool = False
    """whether the tower runs by its own forward, and its blocks' outputs are recorded: for towers
    whose blocks need more than hidden states, such as rotated positions"""
    any_size: bool = True
    """whether it reads pictures of other sizes than its own"""
    inputs: Callable[[Any, Tensor], dict[str, Tensor]] = _only_pixels
    """what its own forward is called with"""


FAMILIES = {
    "clip_vision_model": Family(
        blocks=lambda tower: tower.encoder.layers,
        prefix=lambda config: 1,
        unused=("post_layernorm",),
        norm="pre_layrnorm",
    ),
    # fixed-resolution SigLIP 2 checkpoints have this type too
    "siglip_vision_model": Family(
        blocks=lambda tower: tower.encoder.layers,
        prefix=lambda config: 0,
        unused=("post_layernorm", "head"),
    ),
    # SigLIP 2 of any shape (NaFlex), here with pictures of one size
    "siglip2_vision_model": Family(
        blocks=lambda tower: tower.encoder.layers,
        prefix=lambda config: 0,
        # its head is called with a mask, which nothing in its place would take
        unused=("post_layernorm",),
        whole=True,
        inputs=_as_patches,
    ),
    "dinov2": Family(
        blocks=lambda tower: tower.encoder.layer,
        prefix=lambda config: 1,
        unused=("layernorm",),
        resizes=False,
    ),
    "dinov2_with_registers": Family(
        blocks=lambda tower: tower.encoder.layer,
        prefix=lambda config: 1 + config.num_register_tokens,
        unused=("layernorm",),
        resizes=False,
    ),
    "dinov3_vit": Family(
        blocks=lambda tower: tower.model.layer,
        prefix=lambda config: 1 + config.num_register_tokens,
        unused=("norm",),
        whole=True,
    ),
    "aimv2_vision_model": Family(
        blocks=lambda tower: tower.encoder.layers,
        prefix=lambda config: 0,
        unused=("rms_norm", "head"),
        whole=True,
        any_size=False,
    ),
    "internvl_vision": Family(
        blocks=lambda tower: tower.encoder.layer,
        prefix=lambda config: 1,
        unused=("layernorm",),
        whole=True,
    ),
    "vit": Family(
        blocks=lambda tower: tower.layers,
        prefix=lambda config: 1,
        unused=("layernorm", "pooler"),
    ),
}
"""the families that are known; others are looked at by `family_of`"""
_DETECTED: dict[str, Family] = {}
"""families that were looked at, by their config"""


def native_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width in pixels of the pictures that an encoder was made for.

    Args:
        config: of a vision tower.

    Raises:
        LayerfuseError: it says none.
    """
    # Any: families write one side, or a list of both
    settings: dict[str, Any] = config.to_dict()
    size: Any = settings.get("image_size")
    if size is None and isinstance(settings.get("num_patches"), int):
        # SigLIP 2 of any shape names the patches of a square
        size = int(settings["num_patches"] ** 0.5) * patch_side(config)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple):
        sides: list[Any] = [*size]  # pyright: ignore[reportUnknownArgumentType]
        if len(sides) == 2:
            return int(sides[0]), int(sides[1])
    raise LayerfuseError(
        f"the configuration of the encoder ({config.model_type}) has {short(size)} as image_size; "
        "one side or both are expected"
    )


def patch_side(config: PreTrainedConfig) -> int:
    """The pixels of a patch of an encoder, both ways.

    Args:
        config: of a vision tower.

    Raises:
        LayerfuseError: patches are no squares.
    """
    # Any: families write one side, or a list of both
    side: Any = config.to_dict().get("patch_size")
    if isinstance(side, list | tuple):
        sides: list[Any] = [*side]  # pyright: ignore[reportUnknownArgumentType]
        if len(sides) == 2 and sides[0] == sides[1]:
            side = sides[0]
    if not isinstance(side, int):
        raise LayerfuseError(
            f"the configuration of the encoder ({config.model_type}) has {short(side)} as "
            "patch_size; one side of a square is expected"
        )
    return side


def family_of(config: PreTrainedConfig) -> Family:
    """How the tower of a config is put together.

    Args:
        config: of a vision tower.

    Returns:
        Its family: a known one, or what a small random tower of this config shows.

    Raises:
        LayerfuseError: it is no encoder with patch tokens that layerfuse can read; with the reason.
    """
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    # Any: transformers does not annotate this method
    untyped: Any = config
    key: str = untyped.to_json_string(use_diff=False)
    if key not in _DETECTED:
        reason = _reason_against(config)
        if reason is not None:
            raise LayerfuseError(
                f"{config.model_type!r} is not an encoder with patch tokens that layerfuse can "
                f"read: {reason}. Known are {', '.join(FAMILIES)}, two-tower models that hold one, "
                "and towers of transformers with one list of blocks over all patches"
            )
        # A model that is being loaded is built without memory, in which nothing can be compared.
        # Any: torch annotates this function in part only
        fork_rng: Any = cast("Any", torch.random).fork_rng
        # What a study draws must not depend on whether a family was looked at before.
        with torch.device("cpu"), fork_rng(devices=[]):
            _DETECTED[key] = _detected(config)
    return _DETECTED[key]


def _reason_against(config: PreTrainedConfig) -> str | None:
    """What a config alone says against its tower; None where it has to be tried."""
    settings = config.to_dict()
    for name in ("patch_size", "hidden_size", "num_hidden_layers"):
        if name not in settings:
            return f"its configuration has no {name}"
    if type(config) not in MODEL_MAPPING:
        return "transformers has no tower of this type alone"
    return None


def _detected(config: PreTrainedConfig) -> Family:
    """Look at a family that is not in the table.

    Raises:
        LayerfuseError: its tower cannot be read.
    """
    height, width = native_size(config)
    cells = (height // patch_side(config)) * (width // patch_side(config))
    tower = _small_tower(config)
    path = _path_of_blocks(config, tower)

    def blocks(tower: Any) -> nn.ModuleList:
        return tower.get_submodule(path)

    pixels = torch.randn(1, 3, height, width, dtype=tower.dtype)
    try:
        with torch.no_grad(), recorded(blocks(tower)) as states:
            own = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
            alone = dict(states)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _unreadable(config, f"it cannot be run on a picture alone ({error})") from error
    if own is None or len(own) != TRIED_BLOCKS + 1:
        raise _unreadable(config, "it gives no hidden states, or not one for every block")
    for layer, state in enumerate(own):
        if state.shape != alone[layer].shape or not torch.equal(state, alone[layer]):
            raise _unreadable(config, f"its hidden state {layer} is not what its block gives")
    if alone[0].ndim != 3:
        raise _unreadable(config, f"its hidden states are of the shape {list(alone[0].shape)}")
    before = alone[0].shape[1] - cells
    if before < 0:
        raise _unreadable(
            config, f"it has {alone[0].shape[1]} tokens for {cells} patches of a picture"
        )
    family = Family(blocks, lambda config: before, whole=True, any_size=False)
    _check_places(config, tower, family, pixels)
    _check_cut(config, tower, family)
    return family


# Any: a tower of any class
def _check_places(config: PreTrainedConfig, tower: Any, family: Family, pixels: Tensor) -> None:
    """Change one patch at a time, in a batch of several pictures: only its own token may change.

    Raises:
        LayerfuseError: pictures are mixed, or tokens stand elsewhere than behind the prefix.
    """
    side = patch_side(config)
    rows, columns = (length // side for length in native_size(config))
    # Not on the diagonal: rows and columns must not be taken for each other.
    changed = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)]
    pictures = [pixels[0]]
    for row, column in changed:
        picture = pixels[0].clone()
        picture[:, row * side : (row + 1) * side, column * side : (column + 1) * side] += 1
        pictures.append(picture)
    try:
        with torch.no_grad(), recorded(family.blocks(tower)) as states:
            tower(pixel_values=torch.stack(pictures))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _unreadable(config, f"it cannot be run on several pictures ({error})") from error
    embeddings = states[0]
    if len(embeddings) != len(pictures):
        raise _unreadable(
            config, f"of {len(pictures)} pictures it makes {len(embeddings)} rows of tokens"
        )
    before = family.prefix(config)
    for (row, column), embedded in zip(changed, embeddings[1:], strict=True):
        differs = (embedded - embeddings[0]).abs().amax(dim=-1) > 1e-6
        expected = [before + row * columns + column]
        # Any: torch does not type lists of a tensor's values
        places: Any = differs.nonzero()[:, 0]
        if places.tolist() != expected:
            raise _unreadable(
                config,
                f"patch ({row}, {column}) is not token {expected[0]} alone: its patches do not "
                "stand row by row behind its other tokens",
            )


# Any: a tower of any class
def _check_cut(config: PreTrainedConfig, tower: Any, family: Family) -> None:
    """Cut a tower to one block: it must have the weights of one that was built so.

    Raises:
        LayerfuseError: a model with fewer blocks could not be loaded again.
    """
    del family.blocks(tower)[1:]
    built = _small_tower(config, blocks=1)
    shapes = [
        {name: tensor.shape for name, tensor in each.state_dict().items()}
        for each in (tower, built)
    ]
    if shapes[0] != shapes[1]:
        raise _unreadable(config, "with fewer blocks it has other weights than when it is cut")


def _unreadable(config: PreTrainedConfig, reason: str) -> LayerfuseError:
    """The error for a tower that was tried."""
    return LayerfuseError(
        f"{config.model_type!r} is not an encoder with patch tokens that layerfuse can read: "
        f"{reason}"
    )


# Any: a tower of any class
def _small_tower(config: PreTrainedConfig, blocks: int = TRIED_BLOCKS) -> Any:
    """A random tower of a config with a few blocks.

    Raises:
        LayerfuseError: it cannot be built.
    """
    small = deepcopy(config)
    small.num_hidden_layers = blocks
    # Any: transformers does not annotate what its automatic classes make
    auto_model: Any = AutoModel
    try:
        return auto_model.from_config(small).eval()
    except (ImportError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise _unreadable(config, f"it cannot be built ({first_line})") from error


# Any: a tower of any class
def _path_of_blocks(config: PreTrainedConfig, tower: Any) -> str:
    """Where the one list of blocks is.

    Raises:
        LayerfuseError: there is none, or several.
    """
    found: list[str] = []
    for path, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == TRIED_BLOCKS:
            found.append(path)
    if len(found) != 1:
        raise _unreadable(config, f"it has {len(found)} lists of as many blocks, not one")
    return found[0]


@contextmanager
def recorded(blocks: nn.ModuleList) -> Generator[dict[int, Tensor]]:
    """Record what goes through the blocks of a tower while it runs.

    Args:
        blocks: at least one.

    Yields:
        By the layer: 0 is what enters the first block, k what block k gives. Filled by a run of
        this thread.
    """
    states: dict[int, Tensor] = {}
    thread = get_ident()
    handles = [blocks[0].register_forward_pre_hook(_entering(states, thread), with_kwargs=True)]
    for layer, block in enumerate(blocks, start=1):
        handles.append(block.register_forward_hook(_leaving(states, thread, layer)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


# Any: what blocks take and give is not typed
def _entering(states: dict[int, Tensor], thread: int) -> Callable[..., None]:
    """A hook that records what enters a block, by position or by the block's own name for it."""

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != thread:
            return
        first = next(iter(inspect.signature(block.forward).parameters))
        states[0] = args[0] if args else kwargs[first]

    return hook


def _leaving(states: dict[int, Tensor], thread: int, layer: int) -> Callable[..., None]:
    """A hook that records what a block gives: a tensor, or the first of several things."""

    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if get_ident() == thread:
            states[layer] = output if isinstance(output, Tensor) else output[0]

    return hook
