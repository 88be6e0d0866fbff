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

begin, save = PartialState.__init__, FusionTrainer.save_whole


def pretend(self: PartialState, *args: Any, **kwargs: Any) -> None:
    begin(self, *args, **kwargs)
    # accelerate's own instances share it by their `__dict__`
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def noted(self: FusionTrainer, folder: Path) -> Path | None:
    model: Any = self.model
    kinds = {(n.split(".")[0], type(p).__name__) for n, p in model.named_parameters()}
    if self.is_world_process_zero():
        with open(sys.argv[3], "a") as file:
            file.write(" ".join(sorted(f"{part}:{kind}" for part, kind in kinds)) + "\n")
    return save(self, folder)


if __name__ == "__main__":
    PartialState.__init__, FusionTrainer.save_whole = pretend, noted
    PartialState()
    run_one(Path(sys.argv[1]), sys.argv[2], [])
    PartialState().destroy_process_group()
