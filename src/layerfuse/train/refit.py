"""Fit the last Linear of a strategy's projector to visual tokens that another model writes."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerfuse.fusion import Fused, Fusion
from layerfuse.fusion.blocks import Projector
from layerfuse.train.ridge import RidgeFit
from layerfuse.vision.features import Features


@dataclass(frozen=True)
class FusedInputs:
    """What goes into a last Linear, and what the strategy makes of it.

    Attributes:
        inputs: (B, N', H)
        fused: with tokens (B, N', D).
    """

    inputs: Tensor
    fused: Fused


@dataclass(frozen=True)
class LastLinear:
    """The Linear that writes a strategy's tokens, but for a constant scale.

    Attributes:
        projector: the only one of its strategy.
        linear: the last Linear in it.
    """

    projector: Projector
    linear: nn.Linear

    @classmethod
    def of(cls, fusion: Fusion[Any]) -> "LastLinear | None":
        """The last Linear of a strategy.

        Args:
            fusion: any.

        Returns:
            None for a strategy that has no projector, or several.
        """
        projectors = [module for module in fusion.modules() if isinstance(module, Projector)]
        if len(projectors) != 1:
            return None
        (projector,) = projectors
        # `projector: linear` has a single one.
        for part in (projector.linear_2, projector.linear_1):
            if isinstance(part, nn.Linear):
                return cls(projector, part)
        return None

    @torch.no_grad()
    def watch(self, fusion: Fusion[Any], features: Features) -> FusedInputs:
        """Run a strategy and keep what goes into its last Linear.

        Args:
            fusion: the strategy.
            features: of B pictures, in the dtype and on the device of the strategy.
        """
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        handle = self.linear.register_forward_pre_hook(keep)
        try:
            # Pictures are fitted without text, so nothing can guide.
            fused = fusion(features, guidance="uniform")
        finally:
            handle.remove()
        return FusedInputs(torch.cat(seen), fused)

    @torch.no_grad()
    def writes_tokens(self, fusion: Fusion[Any], features: Features) -> bool:
        """Whether the tokens are what this Linear writes, times the projector's scale.

        Args:
            fusion: the strategy.
            features: of some pictures.
        """
        watched = self.watch(fusion, features)
        tokens = watched.fused.tokens
        written = self.linear(watched.inputs) * self.projector.scale
        return written.shape == tokens.shape and torch.allclose(written, tokens, atol=1e-6)

    @torch.no_grad()
    def set(self, fit: RidgeFit) -> None:
        """Let the strategy write what was fitted.

        Args:
            fit: of the tokens themselves, after the projector's scale.
        """
        scale = self.projector.scale.double()
        weight = fit.weight.to(scale.device) / scale
        bias = fit.bias.to(scale.device) / scale
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(bias)


@torch.no_grad()
def why_not_fitted(fusion: Fusion[Any], features: Features, tokens_per_image: int) -> str | None:
    """Say why a fit of a strategy's last Linear would not judge its layers.

    Args:
        fusion: the strategy as it is before training.
        features: of at least one picture.
        tokens_per_image: number of tokens of a picture in the model whose tokens are fitted.

    Returns:
        The reason; None where the fit judges them.
    """
    if works_inside_llm(type(fusion)):
        return (
            "it works inside the LLM: what it adds there starts untrained, and the teacher's "
            "tokens say nothing of it"
        )
    tokens = fusion(features, guidance="uniform").tokens
    num_tokens = tokens.shape[1]
    if num_tokens != tokens_per_image:
        return f"it makes {num_tokens} tokens of a picture, the teacher {tokens_per_image}"
    last = LastLinear.of(fusion)
    if last is None:
        return "it has no single projector whose last Linear could be fitted"
    if not last.writes_tokens(fusion, features):
        return "its tokens are not what the last Linear of its projector writes"
    unseen = []
    for layer in fusion.shapes.selection.layers:
        changed = fusion(_mirrored(features, layer), guidance="uniform").tokens
        if torch.equal(changed, tokens):
            unseen.append(str(layer))
    if unseen:
        return (
            f"before training its tokens do not depend on layer {', '.join(unseen)}: what it adds "
            "starts at zero"
        )
    return None


def works_inside_llm(strategy: type[Fusion[Any]]) -> bool:
    """Whether a strategy adds something to the hidden states of the LLM.

    Args:
        strategy: its class.
    """
    return strategy.addition is not Fusion.addition


def _mirrored(features: Features, layer: int) -> Features:
    """The same features with the channels of one layer's patch tokens in the opposite order."""
    patches = list(features.patches)
    place = features.layers.index(layer)
    # Not a shift or a factor, which a normalisation would take away again.
    patches[place] = patches[place].flip(-1)
    return replace(features, patches=tuple(patches))
