"""The vision encoder: one pass through only the blocks that the selected layers need."""

import hashlib
import json
from collections.abc import Iterable
from copy import deepcopy
from inspect import signature
from pickle import UnpicklingError
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
from layerfuse.vision.towers import Family, family_of, native_size, patch_side, recorded

NOT_IN_DIGESTS = (
    "num_hidden_layers",
    "_name_or_path",
    "transformers_version",
    "architectures",
)
"""entries of a config that do not change what a layer gives"""


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision part of a two-tower config (CLIP, SigLIP), or the config itself.

    Args:
        config: the config of any model of transformers.

    Returns:
        The config of a vision tower that layerfuse can read.

    Raises:
        LayerfuseError: if it is no vision encoder with patch tokens that layerfuse can read.
    """
    # vars: as an attribute, some configs make up a vision_config that was never given
    vision = vars(config).get("vision_config")
    if not isinstance(vision, PreTrainedConfig):
        vision = config
    family_of(vision)
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
        self.family = family_of(tower.config)
        self.prefix = self.family.prefix(tower.config)
        self.patch_side = patch_side(tower.config)
        self.tower = tower

        # what no selected layer needs costs neither memory nor time
        deepest = _needed_blocks(self.family, self.layers)
        blocks = self.family.blocks(tower)
        del blocks[deepest:]
        self.blocks_take_mask = _take_mask(blocks)
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
        trimmed.num_hidden_layers = _needed_blocks(family_of(config), layers)
        # Any: transformers does not annotate what its automatic classes make
        auto_model: Any = AutoModel
        tower: PreTrainedModel = auto_model.from_config(trimmed)
        return cls(tower, layers, token_grid)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of that many pixels."""
        return self.token_grid or patch_grid(height, width, self.patch_side)

    def forward(self, pixel_values: Tensor) -> Features:
        """Run the tower up to the deepest selected layer.

        Args:
            pixel_values: (B, 3, height, width) preprocessed pixels.

        Returns:
            The features of the selected layers of B images.
        """
        height, width = pixel_values.shape[-2:]
        cells = patch_grid(height, width, self.patch_side)
        if self.family.whole:
            states = self._run_whole(pixel_values)
        else:
            states = self._run_blocks(pixel_values)

        patches: list[Tensor] = []
        summary: list[Tensor] = []
        for layer in self.layers:
            hidden = states[layer]
            patches.append(self._pool(hidden[:, self.prefix :], cells))
            # the first prefix token is CLS; encoders without one are summed up by the mean
            if self.prefix:
                summary.append(hidden[:, 0])
            else:
                summary.append(hidden.mean(dim=1))
        return Features(self.layers, tuple(patches), tuple(summary), self.token_grid or cells)

    def _run_blocks(self, pixel_values: Tensor) -> dict[int, Tensor]:
        """The hidden states of the selected layers, block by block."""
        hidden = self._embed(pixel_values)
        states: dict[int, Tensor] = {}
        if 0 in self.layers:
            states[0] = hidden
        for index, block in enumerate(self.family.blocks(self.tower), start=1):
            hidden = block(hidden, None) if self.blocks_take_mask else block(hidden)
            if index in self.layers:
                states[index] = hidden
        return states

    def _run_whole(self, pixel_values: Tensor) -> dict[int, Tensor]:
        """The hidden states of all layers, by the tower's own forward.

        Raises:
            LayerfuseError: pictures are of a size that this tower does not read.
        """
        native = native_size(self.tower.config)
        height, width = pixel_values.shape[-2:]
        if not self.family.any_size and (height, width) != native:
            raise LayerfuseError(
                f"pictures are {height} x {width} pixels, and the encoder "
                f"({self.tower.config.model_type}) reads pictures of {native[0]} x {native[1]} "
                "alone: set that size in its preprocessor_config.json"
            )
        inputs = self.family.inputs(self.tower.config, pixel_values.to(self.tower.dtype))
        with recorded(self.family.blocks(self.tower)) as states:
            self.tower(**inputs)
        return states

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
            # at the native size the stored positions are taken as they are, bit for bit
            resized = tuple(pixel_values.shape[-2:]) != native_size(self.tower.config)
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


def _take_mask(blocks: nn.ModuleList) -> bool:
    """Whether blocks are given an attention mask: those of DINOv2 are not in transformers 5.16."""
    return all("attention_mask" in signature(block.forward).parameters for block in blocks)


def _needed_blocks(family: Family, layers: Iterable[int]) -> int:
    """How many blocks a tower needs for some layers."""
    deepest = max(layers)
    # a tower that runs by its own forward has at least one, before which layer 0 is recorded
    return max(1, deepest) if family.whole else deepest


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
        The config of a vision tower that layerfuse can read.

    Raises:
        LayerfuseError: if it cannot be found, is no vision encoder that layerfuse can read, or
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
    smallest = min(native_size(vision))
    patch_size = patch_side(vision)
    if smallest < patch_size:
        raise LayerfuseError(
            f"the configuration of the encoder {name}: image_size is {smallest}; valid: at least "
            f"its patch_size, {patch_size}"
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
        LayerfuseError: if it cannot be found, lacks weights that the encoder runs, or has some of
            other shapes than its configuration describes.
    """
    # Any: transformers maps a config to a class or to several, in no common type
    tower_class: Any = MODEL_MAPPING[type(config)]
    try:
        tower, report = tower_class.from_pretrained(
            resolve(name),
            dtype=dtype,
            output_loading_info=True,
            # they are refused below, where they can be named
            ignore_mismatched_sizes=True,
        )
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise LayerfuseError(f"cannot read the encoder {name}: {error}") from error
    refuse_other_shapes(name, config.model_type, report)
    # transformers makes up what a checkpoint lacks, and only says so. A pooler above the last
    # block may be missing: it is never run.
    unused = family_of(config).unused
    missing = [key for key in sorted(report["missing_keys"]) if key.split(".")[0] not in unused]
    if missing:
        raise LayerfuseError(
            f"{name} holds no {config.model_type} as its configuration describes: {len(missing)} "
            f"weights are missing, such as {missing[0]}"
        )
    return tower


def refuse_other_shapes(name: str, model_type: str, report: dict[str, Any]) -> None:
    """Refuse weights of other shapes than a configuration describes.

    Args:
        name: hub id or folder of the model.
        model_type: that its configuration names.
        report: what transformers says of loading it.

    Raises:
        LayerfuseError: there are some; naming one.
    """
    others = sorted(report["mismatched_keys"])
    if others:
        weight, stored, described = others[0]
        raise LayerfuseError(
            f"{name} holds no {model_type} as its configuration describes: {len(others)} weights "
            f"are of other shapes, such as {weight}, which is {list(stored)} and would be "
            f"{list(described)}. Give the weights with the config.json that was saved with them"
        )


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
