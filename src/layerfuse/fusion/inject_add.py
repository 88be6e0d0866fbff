"""Projected layers added at the image positions before chosen LLM blocks.

    V_0 = P_base(h_base) replaces the image tokens;
    x[image] <- x[image] + P_k(h_k)   before LLM block l(k), for every selected layer k

Internal direct fusion (I_D) of "Multi-Layer Visual Feature Fusion in Multimodal LLMs" (2503.06063);
with `placement: first` the DeepStack of Qwen3-VL. The KV cache carries the effect into decoding.
"""

import torch
from torch import Tensor, nn

from layerfuse.errors import LayerfuseError
from layerfuse.fusion.base import BaseLayerConfig, Fusion, Shapes, options, register
from layerfuse.fusion.blocks import Projector
from layerfuse.fusion.flat_projector import FlatProjector
from layerfuse.fusion.injector import Placement, llm_blocks
from layerfuse.fusion.visual import Fused, Guidance, Placed, spread
from layerfuse.vision.features import Features


@options
class InjectAddConfig(BaseLayerConfig):
    """Options of `inject_add`."""

    placement: Placement = "proportional"
    """The LLM block before which each selected layer is added: `proportional` puts layer k of an
    encoder with n blocks before block int(k·L/n − 1) of an LLM with L blocks (2503.06063, which
    takes blocks 0..11 and the last 12 for its sets former and latter: give a list), `first`
    adds in order to the outputs of blocks 0, 1, 2, ... as Qwen3-VL does (which is before blocks 1,
    2, 3, ...), `last` uses the last blocks in order, a list names one block per layer."""
    gate: bool = False
    """Multiply what each layer adds by tanh(g), with g learned from zero, so that training starts
    at the base layer alone. Off as published."""


@register("inject_add", InjectAddConfig)
class InjectAdd(Fusion[InjectAddConfig]):
    """One projector per injected layer and one for the base layer."""

    kind = "internal direct"
    paper = "I_D, DeepStack as in Qwen3-VL"
    summary = "each layer added before an LLM block of its own"
    published = (3, 18)

    def __init__(self, config: InjectAddConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.blocks = llm_blocks(config.placement, shapes)
        self.projector = Projector(shapes.vision_width, shapes.llm_width)
        self.projectors = nn.ModuleList()
        for _ in self.blocks:
            self.projectors.append(Projector(shapes.vision_width, shapes.llm_width))
        self.gates: nn.Parameter | None = None
        if config.gate:
            # zero is closed: training starts at the base layer alone
            self.gates = nn.Parameter(torch.zeros(len(self.blocks)))

    def forward(
        self,
        features: Features,
        instruction: Tensor | None = None,
        guidance: Guidance = "instruction",
    ) -> Fused:
        memory: dict[int, Tensor] = {}
        layers = self.normalized(features, self.shapes.selection.layers)
        for index, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
            # P_k(h_k): (B, N, Dv) -> (B, N, D)
            added = self.projectors[index](layer)
            if self.gates is not None:
                added = added * self.gates[index].tanh()
            # in a shallow LLM several layers may meet in one block
            if block in memory:
                added = memory[block] + added
            memory[block] = added
        base = self.normalized(features, [self.config.base])[0]
        return Fused(self.projector(base), memory)

    def addition(self, block: int, hidden: Tensor, visual: Placed) -> Tensor:
        """Nothing while decoding: the KV cache carries what was added in the prompt."""
        if visual.mask is None:
            return hidden.new_zeros(())
        memory = visual.memory[block].to(hidden.dtype)
        return spread(memory, visual.mask)

    def openings(self) -> dict[str, float]:
        if self.gates is None:
            return {}
        openings: dict[str, float] = {}
        for layer, block, gate in zip(
            self.shapes.selection.layers, self.blocks, self.gates, strict=True
        ):
            openings[f"layer {layer} before block {block}"] = float(gate.detach().tanh())
        return openings

    def begin_as(self, given: FlatProjector) -> None:
        if self.gates is None:
            raise LayerfuseError(
                "inject_add begins as a given model only with closed gates: set `gate: true`"
            )
        self.begin_projector(self.projector, given, {self.config.base: 0})
