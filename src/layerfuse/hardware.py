"""The device of this process, the arithmetic that it has, and the memory that is free."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

Value = TypeVar("Value")

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds the limits of its own."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    # PyTorch names the accelerator that it was built for even where the machine has none
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return accelerator


@dataclass(frozen=True)
class Process:
    """One of the processes that were launched together.

    Attributes:
        index: its place among them.
        number: how many they are.
    """

    index: int
    number: int

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.index == 0

    def gather(self, values: list[Value]) -> list[Value]:
        """Put the lists of all processes together; each must call this.

        Args:
            values: those of this process.

        Returns:
            The values of all processes, in the order of the processes, in each of them.
        """
        return gather_object(values)

    def from_first(self, value: Value) -> Value:
        """Give the first process's value to all; each must call this.

        Args:
            value: counts in the first process.

        Returns:
            The first process's value.
        """
        [received] = broadcast_object_list([value])
        return received


def joined_process() -> Process:
    """Join the processes that were launched together; alone, a process is the first of one.

    Returns:
        This process.
    """
    # Told of the CPU, processes without GPUs join too.
    state = PartialState(cpu=device().type == "cpu")
    return Process(state.process_index, state.num_processes)


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


def free_memory() -> int:
    """Bytes of main memory that processes of this one's group may still take."""
    free = psutil.virtual_memory().available
    # In a container the machine's free memory is more than what may be used.
    limit_text = _read_cgroup("memory.max")
    if limit_text.isdecimal():
        used = int(_read_cgroup("memory.current"))
        for line in _read_cgroup("memory.stat").splitlines():
            name, _, size = line.partition(" ")
            # Pages of files that the kernel drops when it needs their room.
            if name == "inactive_file":
                used -= int(size)
        free = min(free, int(limit_text) - used)
    return max(free, 0)


def _read_cgroup(name: str) -> str:
    """A file of this process's control group (Linux, version 2), empty where there is none."""
    file = CGROUP / name
    if not file.is_file():
        return ""
    return file.read_text("utf-8").strip()
