"""Pooled early layers appended as further tokens.

    V = [P(h_base) ; P(pool(h_a)) ; P(pool(h_b)) ; ...]     pool: mean of s tokens in raster order

STI of DenseConnector (2405.13800): 576 + 72 + 72 = 720 tokens for CLIP-L/336 with layers 7 and 15
and s = 8. Pooling is along the raster, not in two dimensions: on a grid 24 wide each pooled token
is a strip of 1×8 patches. Tokens that do not fill a last strip are dropped (729 -> 91).
"""

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import BaseLayerConfig, Fusion, Shapes, options, register
from layerfuse.fusion.blocks import Projector
from layerfuse.fusion.visual import Fused, Guidance
from layerfuse.vision.features import Features


@options
class TokenConcatConfig(BaseLayerConfig):
    """Options of `token_concat`."""

    stride: PositiveInt = 8
    """Number of neighbouring tokens in raster order that are averaged into one."""


@register("token_concat", TokenConcatConfig)
class TokenConcat(Fusion[TokenConcatConfig]):
    """The base layer's tokens, then the pooled tokens of each layer, through one projector."""

    kind = "external direct"
    paper = "DenseConnector STI"
    summary = "pooled early layers as further tokens"
    published = (7, 15)

    def __init__(self, config: TokenConcatConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.projector = Projector(shapes.vision_width, shapes.llm_width)

    @classmethod
    def num_tokens(cls, config: TokenConcatConfig, grid: tuple[int, int], layers: int) -> int:
        tokens = grid[0] * grid[1]
        if tokens < config.stride:
            raise LayerfuseError(
                f"stride {config.stride} is more than the {tokens} tokens of a grid of "
                f"{grid[0]}×{grid[1]}; valid: 1..{tokens}"
            )
        # tokens that do not fill a last strip are dropped
        strips = tokens // config.stride
        return tokens + layers * strips

    @classmethod
    def cover(cls, config: TokenConcatConfig, grid: tuple[int, int], layers: int) -> Tensor:
        cells = torch.eye(grid[0] * grid[1])
        # (cells, cells) -> (strips, cells): what averages tokens averages the cells below them
        strips = F.avg_pool1d(cells.mT, config.stride).mT
        return torch.cat([cells, *[strips] * layers])

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        parts = self.normalized(features, [self.config.base])
        for early in self.normalized(features, self.shapes.selection.layers):
            # pooling runs along the last axis: (B, N, Dv) -> (B, Dv, N) -> (B, N // stride, Dv)
            pooled = F.avg_pool1d(early.mT, self.config.stride)
            parts.append(pooled.mT)
        # one projector for all, so that every token speaks the same language
        return Fused(self.projector(torch.cat(parts, dim=1)))
