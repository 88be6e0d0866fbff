"""An LLM whose later blocks are on another device than the fusion, as a `device_map` puts them.

No second device is needed: fake tensors have shapes and devices and no values, and an operation on
tensors of two devices is the same error as on GPUs.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from layerfuse import FusionVLM
from tests import tiny
from tests.random_prompts import prompts

# Names of devices for which torch needs no driver.
FIRST, SECOND = "lazy:0", "lazy:1"
FIRST_BLOCKS = 2
"""as many blocks as are on the first device; the strategies inject before later ones too"""


def fake(tensor: Tensor, device: str) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def move(module: nn.Module, device: str) -> None:
    """Give a module fake weights on a device, and move its inputs there as accelerate does."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            weight = nn.Parameter(fake(parameter, device), requires_grad=False)
            setattr(part, name, weight)
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, fake(buffer, device))
        add_hook_to_module(part, AlignDevicesHook(execution_device=device))


def move_llm(model: FusionVLM) -> None:
    """The first blocks and the fusion on one device, the rest on another."""
    move(model.fusion, FIRST)
    llm: Any = model.language_model
    move(llm.model.embed_tokens, FIRST)
    move(llm.model.rotary_emb, FIRST)
    for number, block in enumerate(llm.model.layers):
        move(block, FIRST if number < FIRST_BLOCKS else SECOND)
    move(llm.model.norm, SECOND)
    move(llm.lm_head, SECOND)


@torch.no_grad()
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("inject_add", {}),
        ("inject_cross", {"position": "pre"}),
        ("inject_cross", {"position": "post"}),
        ("inject_cross", {"position": "parallel"}),
        ("inject_cross", {"position": "pre", "released_residual": True}),
    ],
)
def test_later_blocks_reach_the_fusion_on_another_device(
    strategy: str, options: dict[str, Any]
) -> None:
    model = tiny.model(strategy, **options)
    visual = model(**prompts(model, [1, 2])).visual
    assert max(visual.memory) > FIRST_BLOCKS

    with FakeTensorMode():
        move_llm(model)
        memory = {block: fake(tensor, FIRST) for block, tensor in visual.memory.items()}
        seen = fake(visual.seen, FIRST)
        fake_visual = replace(visual, memory=memory, mask=fake(visual.mask, FIRST), seen=seen)
        width = model.config.get_text_config().hidden_size
        embeddings = torch.empty(2, 60, width, device=FIRST)
        output = model.language_model(inputs_embeds=embeddings, visual=fake_visual, use_cache=False)

    assert output.logits.device == torch.device(SECOND)
