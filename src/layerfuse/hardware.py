"""The device of this process and the arithmetic that it has."""

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    # PyTorch names the accelerator that it was built for even where the machine has none
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return accelerator


def native_dtype() -> str:
    """The dtype to train in on this process's device.

    Returns:
        `bfloat16` where the device computes in it, else `float32`.
    """
    kind = device().type
    # emulated bfloat16 does not count: it saves no time and is less exact than float32
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        native = torch.cpu._is_avx512_bf16_supported()
    else:
        # PyTorch cannot be asked about other accelerators: they are taken to have it
        native = True
    if native:
        return "bfloat16"
    return "float32"
