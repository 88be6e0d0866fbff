"""One process of a run under FSDP2 on CPU, which accelerate offers on GPUs only: it goes by the
kind of device that the processes have, and these say that theirs is a GPU.

Arguments: study, folder of the run, file in which the first process notes what was sharded.
"""

import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from layerfuse.study.execute import run_one
from layerfuse.train.trainer import FusionTrainer

original_init = PartialState.__init__
original_save_whole = FusionTrainer.save_whole


def init_as_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    """In the place of accelerate's: say that the devices are GPUs."""
    original_init(self, *args, **kwargs)
    # accelerate's own instances share it by their `__dict__`
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def save_whole_and_note(self: FusionTrainer, folder: Path) -> Path | None:
    """In the place of the trainer's: note the class of each part's parameters and the kernel of
    attention, a line a stage."""
    model: Any = self.model
    kinds = set()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        # A sharded parameter is a DTensor.
        kinds.add(f"{part}:{type(parameter).__name__}")
    # transformers has no public name for it
    kernel = model.language_model.config._attn_implementation  # noqa: SLF001
    kinds.add(f"attention:{kernel}")
    if self.is_world_process_zero():
        with open(sys.argv[3], "a") as file:
            file.write(" ".join(sorted(kinds)) + "\n")
    return original_save_whole(self, folder)


if __name__ == "__main__":
    study_folder = Path(sys.argv[1])
    run_folder = sys.argv[2]
    PartialState.__init__ = init_as_on_gpus
    FusionTrainer.save_whole = save_whole_and_note
    # Its first instance makes the process group; all later ones share it.
    PartialState()
    run_one(study_folder, run_folder, [])
    # torch warns of a group that is left behind.
    PartialState().destroy_process_group()
