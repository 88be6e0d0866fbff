"""The vision encoder: one pass through only the blocks that the selected layers need."""

import hashlib
import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from layerfuse.errors import LayerfuseError
from layerfuse.hardware import device
from layerfuse.local_models.configuration import check_build, check_sizes, read_config
from layerfuse.local_models.registry import resolve
from layerfuse.vision.features import Features

NOT_IN_DIGESTS = (
    "num_hidden_layers",
    "_name_or_path",
    "transformers_version",
    "architectures",
)
"""entries of a config that do not change what a layer gives"""


@dataclass(frozen=True)
class Family:
    """How a family of Hugging Face vision towers is put together."""

    # Any: transformers names submodules and settings per family, in no common type
    blocks: Callable[[Any], nn.ModuleList]
    """the blocks of a tower, from the bottom up"""
    prefix: Callable[[Any], int]
    """number of tokens before the patches, read from the config"""
    unused: tuple[str, ...]
    """submodules after the last block, which layerfuse never runs"""
    resizes: bool = True
    """whether the embeddings must be told of images that are not of the native size"""
    norm: str | None = None
    """submodule between the embeddings and block 1"""


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
    "vit": Family(
        blocks=lambda tower: tower.layers,
        prefix=lambda config: 1,
        unused=("layernorm", "pooler"),
    ),
}


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision part of a two-tower config (CLIP, SigLIP), or the config itself.

    Args:
        config: the config of any model of transformers.

    Returns:
        The config of a vision tower of one of `FAMILIES`.

    Raises:
        LayerfuseError: if it is no vision encoder with patch tokens that layerfuse knows.
    """
    # vars: as an attribute, some configs make up a vision_config that was never given
    vision = vars(config).get("vision_config")
    if not isinstance(vision, PreTrainedConfig):
        vision = config
    if vision.model_type not in FAMILIES:
        raise LayerfuseError(
            f"{config.model_type!r} is not an encoder with patch tokens that layerfuse knows; "
            f"valid model types: {', '.join(FAMILIES)} (or a two-tower model that holds one)"
        )
    return vision


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of the patches of a preprocessed image, before they are pooled.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        patch_size: pixels of a patch, both ways.
    """
    # pixels that fill no whole patch are not seen by the encoder
    return height // patch_size, width // patch_size


class Encoder(nn.Module):
    """A Hugging Face vision tower, cut above the deepest layer in `layers`.

    Args:
        tower: the tower with all its blocks; it is cut in place.
        layers: resolved (non-negative) indices into `hidden_states`.
        token_grid: (rows, columns) to which the patch tokens of every layer are average-pooled;
            None keeps all.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        layers: Iterable[int],
        token_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.layers = tuple(sorted(set(layers)))
        self.token_grid = token_grid
        self.family = FAMILIES[tower.config.model_type]
        self.prefix = self.family.prefix(tower.config)
        self.tower = tower

        # what no selected layer needs costs neither memory nor time
        deepest = self.layers[-1]
        blocks = self.family.blocks(tower)
        del blocks[deepest:]
        for name in self.family.unused:
            setattr(tower, name, nn.Identity())

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, layers: Iterable[int], token_grid: tuple[int, int] | None
    ) -> "Encoder":
        """An encoder with random weights, built only up to its deepest layer.

        Args:
            config: the config of the whole tower, which is left as it is.
            layers: as for the class; read twice, so no iterator.
            token_grid: as for the class.
        """
        trimmed = deepcopy(config)
        trimmed.num_hidden_layers = max(layers)
        # Any: transformers does not annotate what its automatic classes make
        auto_model: Any = AutoModel
        tower: PreTrainedModel = auto_model.from_config(trimmed)
        return cls(tower, layers, token_grid)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of that many pixels."""
        return self.token_grid or patch_grid(height, width, self.tower.config.patch_size)

    def forward(self, pixel_values: Tensor) -> Features:
        """Run the tower up to the deepest selected layer.

        Args:
            pixel_values: (B, 3, height, width) preprocessed pixels.

        Returns:
            The features of the selected layers of B images.
        """
        height, width = pixel_values.shape[-2:]
        cells = patch_grid(height, width, self.tower.config.patch_size)
        hidden = self._embed(pixel_values)
        hidden_states: list[Tensor] = []
        if 0 in self.layers:
            hidden_states.append(hidden)
        for index, block in enumerate(self.family.blocks(self.tower), start=1):
            hidden = block(hidden, None)
            if index in self.layers:
                hidden_states.append(hidden)

        patches: list[Tensor] = []
        summary: list[Tensor] = []
        for hidden in hidden_states:
            patches.append(self._pool(hidden[:, self.prefix :], cells))
            # the first prefix token is CLS; encoders without one are summed up by the mean
            if self.prefix:
                summary.append(hidden[:, 0])
            else:
                summary.append(hidden.mean(dim=1))
        return Features(self.layers, tuple(patches), tuple(summary), self.token_grid or cells)

    def digests(self) -> dict[int, str]:
        """What determines the features of each layer, as one key of a cache.

        Returns:
            For each layer from 0 to the deepest, the SHA-256 of all that its features depend on:
            the config, the token grid, the dtype, and the weights of the embeddings and of the
            blocks up to it.
        """
        settings = self.tower.config.to_diff_dict()
        for key in NOT_IN_DIGESTS:
            settings.pop(key, None)
        facts = [settings, self.token_grid, str(self.tower.dtype)]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())

        # parameters are told apart by identity: their names differ between families
        blocks = self.family.blocks(self.tower)
        ids_in_blocks = {id(parameter) for parameter in blocks.parameters()}
        below_blocks: list[tuple[str, Tensor]] = []
        for name, tensor in self.tower.state_dict(keep_vars=True).items():
            if id(tensor) not in ids_in_blocks:
                below_blocks.append((name, tensor))
        _feed(digest, below_blocks)

        # one running digest: what lies above a layer cannot change that layer's features
        digests = {0: digest.hexdigest()}
        for index, block in enumerate(blocks, start=1):
            _feed(digest, sorted(block.state_dict().items()))
            digests[index] = digest.hexdigest()
        return digests

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """Hidden state 0: (B, 3, height, width) -> (B, prefix + patches, D)"""
        embeddings = self.tower.get_submodule("embeddings")
        pixel_values = pixel_values.to(self.tower.dtype)
        if self.family.resizes:
            native = self.tower.config.image_size
            native_size = (native, native) if isinstance(native, int) else tuple(native)
            # at the native size the stored positions are taken as they are, bit for bit
            resized = tuple(pixel_values.shape[-2:]) != native_size
            hidden = embeddings(pixel_values, interpolate_pos_encoding=resized)
        else:
            hidden = embeddings(pixel_values)
        if self.family.norm is not None:
            hidden = self.tower.get_submodule(self.family.norm)(hidden)
        return hidden

    def _pool(self, patches: Tensor, cells: tuple[int, int]) -> Tensor:
        """(B, patches, D) -> (B, N, D), averaged to the token grid if there is one."""
        if self.token_grid is None:
            return patches
        maps = torch.unflatten(patches.transpose(1, 2), 2, cells)
        pooled = F.adaptive_avg_pool2d(maps, self.token_grid)
        return pooled.flatten(2).transpose(1, 2)


class _Digest(Protocol):
    """A hash of hashlib, which does not export its type."""

    def update(self, data: bytes | memoryview, /) -> None: ...


def _feed(digest: _Digest, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Let a digest depend on the names and the bytes of tensors."""
    for name, tensor in tensors:
        digest.update(name.encode())
        content = tensor.detach().cpu().contiguous()
        if content.ndim:
            digest.update(content.view(torch.uint8).numpy().data)
        else:
            # a scalar cannot be viewed as bytes
            digest.update(str(content.item()).encode())


def load_vision_config(
    name: str | PreTrainedConfig,
    settings: dict[str, Any] | None = None,
) -> PreTrainedConfig:
    """The vision config of an encoder.

    Args:
        name: a hub id, folder or local-model name, or a config that is loaded already.
        settings: the configuration that a recipe spells out; None reads that of `name`.

    Returns:
        The config of a vision tower of one of `FAMILIES`.

    Raises:
        LayerfuseError: if it cannot be found, is no vision encoder that layerfuse knows, or
            describes none that can be built.
    """
    if not isinstance(name, str):
        return vision_config_of(name)
    vision = vision_config_of(read_config(name, "encoder", settings))
    check_sizes(name, "encoder", vision)
    _check_image_size(name, vision)
    if settings is not None:
        # A checkpoint was built once; what stands in a recipe may never have been.
        check_build(name, "encoder", vision, AutoModel)
    return vision


def _check_image_size(name: str, vision: PreTrainedConfig) -> None:
    """Raise LayerfuseError if the encoder's own pictures hold no patch."""
    # Any: families write one side of a square, or both sides
    image_size: Any = vision.image_size
    smallest = image_size
    if not isinstance(image_size, int):
        smallest = min(image_size)
    patch_size: int = vision.patch_size
    if smallest < patch_size:
        raise LayerfuseError(
            f"the configuration of the encoder {name}: image_size is {image_size!r}; valid: at "
            f"least its patch_size, {patch_size}"
        )


def load_tower(name: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The pretrained vision tower of an encoder.

    Args:
        name: a hub id, folder or local-model name.
        config: its vision config, as `load_vision_config` gives it.
        dtype: the dtype of the weights.

    Returns:
        The whole tower, also where the checkpoint holds a text tower beside it.

    Raises:
        LayerfuseError: if it cannot be found, or lacks weights that the encoder runs.
    """
    # Any: transformers maps a config to a class or to several, in no common type
    tower_class: Any = MODEL_MAPPING[type(config)]
    try:
        tower, report = tower_class.from_pretrained(
            resolve(name),
            dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise LayerfuseError(f"cannot read the encoder {name}: {error}") from error
    # transformers makes up what a checkpoint lacks, and only says so. A pooler above the last
    # block may be missing: it is never run.
    unused = FAMILIES[config.model_type].unused
    missing = [key for key in sorted(report["missing_keys"]) if key.split(".")[0] not in unused]
    if missing:
        raise LayerfuseError(
            f"{name} holds no {config.model_type} as its configuration describes: {len(missing)} "
            f"weights are missing, such as {missing[0]}"
        )
    return tower


def load_encoder(name: str, dtype: torch.dtype = torch.float32) -> Encoder:
    """The whole pretrained encoder with every layer 0..L, on this process's device.

    Args:
        name: a hub id, folder or local-model name.
        dtype: the dtype of the weights.

    Returns:
        The encoder in evaluation mode.

    Raises:
        LayerfuseError: if it cannot be found, or is no vision encoder that layerfuse knows.
    """
    config = load_vision_config(name)
    tower = load_tower(name, config, dtype)
    every_layer = range(config.num_hidden_layers + 1)
    encoder = Encoder(tower, every_layer)
    return encoder.to(device()).eval()
