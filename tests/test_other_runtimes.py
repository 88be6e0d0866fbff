"""Graphs of encoder and fusion for other runtimes, and assisted decoding."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from layerfuse import FusionVLM
from tests import tiny
from tests.random_prompts import prompts

EXTERNAL = ("single", "concat", "group_mean", "weighted_sum", "token_concat", "deformable")
"""strategies all of whose work is done before the LLM, and without a question"""
# each takes seconds, and the others are parts of these
OFTEN = ("concat", "deformable")
IN_ONNX = [
    name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in EXTERNAL
]


class VisualTokens(nn.Module):
    """What a server needs of a model to encode pictures."""

    def __init__(self, model: FusionVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, N, D)"""
        return self.model.fuse(self.model.vision_tower(pixel_values)).tokens


def pixels(images: int) -> Tensor:
    torch.manual_seed(images)
    return torch.randn(images, 3, tiny.SIZE, tiny.SIZE)


@pytest.mark.parametrize("strategy", EXTERNAL)
@torch.no_grad()
def test_an_exported_program_takes_any_number_of_images(strategy: str) -> None:
    module = VisualTokens(tiny.model(strategy)).eval()
    images = torch.export.Dim("images", min=2, max=64)

    program = torch.export.export(
        module, (pixels(2),), dynamic_shapes={"pixel_values": {0: images}}, strict=False
    )

    other = pixels(5)
    torch.testing.assert_close(program.module()(other), module(other))


# torch's own exporter calls what torch has deprecated
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("strategy", IN_ONNX)
@torch.no_grad()
def test_onnxruntime_gives_the_same_tokens(strategy: str) -> None:
    module = VisualTokens(tiny.model(strategy)).eval()
    images = torch.export.Dim("images", min=2, max=64)
    # Any: torch annotates its exporter in part only
    exporter: Any = torch.onnx

    program = exporter.export(
        module,
        (pixels(2),),
        dynamic_shapes={"pixel_values": {0: images}},
        dynamo=True,
        verbose=False,
    )

    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    other = pixels(3)
    (tokens,) = session.run(None, {"pixel_values": other.numpy()})
    expected = module(other).numpy()
    assert np.abs(tokens - expected).max() < 1e-4


# transformers warns of its own call of the model that writes candidates
@pytest.mark.parametrize("strategy", ["concat", "inject_add", "inject_cross"])
@torch.no_grad()
def test_assisted_decoding_gives_the_greedy_answer(strategy: str) -> None:
    """Candidates are looked up in the prompt, or written by another model, which sees the images:
    where both are one model, all its candidates are taken."""
    model = tiny.model(strategy)
    batch = prompts(model, [1])
    settings = {"max_new_tokens": 8, "do_sample": False}
    greedy = model.generate(**batch, **settings)
    steps: list[int] = []
    model.register_forward_hook(lambda *_: steps.append(1))

    looked_up = model.generate(**batch, **settings, prompt_lookup_num_tokens=3)
    steps.clear()
    other = model.generate(**batch, **settings, assistant_model=tiny.model(strategy, seed=4))
    steps_with_another = len(steps)
    steps.clear()
    same = model.generate(**batch, **settings, assistant_model=tiny.model(strategy))

    assert torch.equal(looked_up, greedy)
    assert torch.equal(other, greedy)
    assert torch.equal(same, greedy)
    assert len(steps) < steps_with_another
