"""The precision of a whole model, as a checkpoint of that precision would be loaded."""

from typing import Any

import torch
from torch import nn

from layerfuse.fusion.whitening import Whiten


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a checkpoint holds: parameters and persistent buffers, in place.

    `Module.to` would also round the rotary frequencies, which loading a checkpoint never does.
    Whitening keeps its float32 constants, as it does when it is loaded.
    """
    saved = module.state_dict().keys()
    # Any: torch types in part what a module names
    whole: Any = module
    for path, part in whole.named_modules():
        if isinstance(part, Whiten):
            continue
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in part.named_buffers(recurse=False):
            place = f"{path}.{name}" if path else name
            if buffer.is_floating_point() and place in saved:
                part.register_buffer(name, buffer.to(dtype))
