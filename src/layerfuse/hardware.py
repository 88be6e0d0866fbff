"""The device of this process and the arithmetic that it has."""

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    found = torch.accelerator.current_accelerator()
    return found if found is not None and torch.accelerator.is_available() else torch.device("cpu")


def native_dtype() -> str:
    """`bfloat16` where this process's device computes in it, else `float32`."""
    kind = device().type
    gpu = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = kind == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if gpu or cpu or kind not in ("cuda", "cpu") else "float32"
