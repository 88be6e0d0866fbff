"""The vision encoder: one pass through only the blocks that the selected layers need."""

import hashlib
import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from layerfuse.hardware import device
from layerfuse.local_models.registry import resolve
from layerfuse.vision.features import Features


@dataclass(frozen=True)
class Family:
    """How a family of Hugging Face vision towers is put together."""

    blocks: Callable[[Any], nn.ModuleList]
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
        lambda t: t.encoder.layers, lambda c: 1, ("post_layernorm",), norm="pre_layrnorm"
    ),
    "siglip_vision_model": Family(  # fixed-resolution SigLIP 2 checkpoints have this type too
        lambda t: t.encoder.layers, lambda c: 0, ("post_layernorm", "head")
    ),
    "dinov2": Family(lambda t: t.encoder.layer, lambda c: 1, ("layernorm",), resizes=False),
    "dinov2_with_registers": Family(
        lambda t: t.encoder.layer, lambda c: 1 + c.num_register_tokens, ("layernorm",), False
    ),
    "vit": Family(lambda t: t.layers, lambda c: 1, ("layernorm", "pooler")),
}


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision part of a two-tower config (CLIP, SigLIP), or the config itself.

    Raises ValueError if it is no vision encoder with patch tokens that layerfuse knows.
    """
    vision = vars(config).get("vision_config")
    found = vision if isinstance(vision, PreTrainedConfig) else config
    if found.model_type not in FAMILIES:
        raise ValueError(
            f"{config.model_type!r} is not an encoder with patch tokens that layerfuse knows; "
            f"valid model types: {', '.join(FAMILIES)} (or a two-tower model that holds one)"
        )
    return found


class Encoder(nn.Module):
    """A Hugging Face vision tower, cut above the deepest layer in `layers`.

    `layers` are resolved (non-negative) indices into `hidden_states`. With `token_grid`, the patch
    tokens of every layer are average-pooled to that (rows, columns) grid.
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
        blocks = self.family.blocks(tower)
        del blocks[self.layers[-1] :]
        for name in self.family.unused:
            setattr(tower, name, nn.Identity())

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, layers: Iterable[int], token_grid: tuple[int, int] | None
    ) -> "Encoder":
        """An encoder with random weights, built only up to its deepest layer."""
        trimmed = deepcopy(config)
        trimmed.num_hidden_layers = max(layers)
        return cls(AutoModel.from_config(trimmed), layers, token_grid)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of that many pixels."""
        patch = self.tower.config.patch_size
        return self.token_grid or (height // patch, width // patch)

    def forward(self, pixel_values: Tensor) -> Features:
        """(B, 3, height, width) preprocessed pixels -> the features of the selected layers."""
        size, config = pixel_values.shape[-2:], self.tower.config
        native = config.image_size
        native = (native, native) if isinstance(native, int) else tuple(native)
        told = {"interpolate_pos_encoding": tuple(size) != native} if self.family.resizes else {}
        h = self.tower.get_submodule("embeddings")(pixel_values.to(self.tower.dtype), **told)
        if self.family.norm is not None:
            h = self.tower.get_submodule(self.family.norm)(h)
        taken = [h] if 0 in self.layers else []
        for index, block in enumerate(self.family.blocks(self.tower), start=1):
            h = block(h, None)
            if index in self.layers:
                taken.append(h)
        cells = (size[0] // config.patch_size, size[1] // config.patch_size)
        patches = tuple(self._pool(x[:, self.prefix :], cells) for x in taken)
        summary = tuple(x[:, 0] if self.prefix else x.mean(dim=1) for x in taken)
        return Features(self.layers, patches, summary, self.token_grid or cells)

    def _pool(self, patches: Tensor, cells: tuple[int, int]) -> Tensor:
        if self.token_grid is None:
            return patches
        maps = patches.transpose(1, 2).unflatten(2, cells)
        return F.adaptive_avg_pool2d(maps, self.token_grid).flatten(2).transpose(1, 2)

    def digests(self) -> dict[int, str]:
        """SHA-256 of all that determines the features of each layer up to the deepest: the config,
        the token grid, the dtype, and the weights of the embeddings and of the blocks up to it."""
        settings = self.tower.config.to_diff_dict()
        for key in ("num_hidden_layers", "_name_or_path", "transformers_version", "architectures"):
            settings.pop(key, None)
        about = [settings, self.token_grid, str(self.tower.dtype)]
        running = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        blocks = self.family.blocks(self.tower)
        inside = {id(p) for p in blocks.parameters()}
        outside = [(n, p) for n, p in self.tower.state_dict(keep_vars=True).items()]
        _feed(running, [(n, p) for n, p in outside if id(p) not in inside])
        found = {0: running.hexdigest()}
        for index, block in enumerate(blocks, start=1):
            _feed(running, sorted(block.state_dict().items()))
            found[index] = running.hexdigest()
        return found


def _feed(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        digest.update(name.encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.view(torch.uint8).numpy() if data.ndim else str(data.item()).encode())


def load_vision_config(name: str | PreTrainedConfig) -> PreTrainedConfig:
    """The vision config of a hub id, folder or local-model name.

    Raises ValueError if it is no vision encoder; OSError if it cannot be found.
    """
    if isinstance(name, str):
        name = AutoConfig.from_pretrained(resolve(name))
    return vision_config_of(name)


def load_tower(name: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The pretrained vision tower of a hub id, folder or local-model name."""
    tower_class: Any = MODEL_MAPPING[type(config)]
    return tower_class.from_pretrained(resolve(name), dtype=dtype)


def load_encoder(name: str, dtype: torch.dtype = torch.float32) -> Encoder:
    """The whole pretrained encoder with every layer 0..L, on this process's device."""
    config = load_vision_config(name)
    tower = load_tower(name, config, dtype)
    return Encoder(tower, range(config.num_hidden_layers + 1)).to(device()).eval()
