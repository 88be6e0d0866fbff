"""How long the command line takes to start, in seconds of processor time and as ratios.

Each command runs in a process of its own, in turns, after a round that fills the caches of files
and of compiled modules. On an idle machine with files in memory these seconds are those on a clock.
"""

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from _measure import ratio_of
from rich.console import Console
from rich.table import Table

ROUNDS, SLOW_ROUNDS = 5, 2
LAYERFUSE = str(Path(sys.executable).with_name("layerfuse"))
PYTHON, IMPORTS = "python -c pass", "python -c 'import torch, transformers'"
MODELS, PACKAGE = "transformers' model classes", "python -c 'import layerfuse'"
HELP, LIST = "layerfuse --help", "layerfuse list fusions"
COMMANDS = {
    PYTHON: [sys.executable, "-c", "pass"],
    IMPORTS: [sys.executable, "-c", "import torch, transformers"],
    # What the package itself is built on: transformers imports its model classes when asked.
    MODELS: [
        sys.executable,
        "-c",
        "from transformers import AutoModelForCausalLM, PreTrainedModel",
    ],
    PACKAGE: [sys.executable, "-c", "import layerfuse"],
    HELP: [LAYERFUSE, "--help"],
    LIST: [LAYERFUSE, "list", "fusions"],
}
AIMS = {HELP: "0.5"}


def seconds(command: list[str]) -> float:
    """Processor time of a command, its own and the system's."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            if name == LIST and not 0 < turn <= SLOW_ROUNDS:
                continue
            spent = seconds(command)
            if turn:
                taken[name].append(spent)
    columns = (
        "seconds",
        "aim, below",
        f"/ {PYTHON}",
        "/ import torch, transformers",
        f"/ {MODELS}",
    )
    table = Table("command", *columns, box=None)
    for name, found in taken.items():
        bases = [taken[other][: len(found)] for other in (PYTHON, IMPORTS, MODELS)]
        ratios = [str(ratio_of(found, base)) for base in bases]
        table.add_row(name, f"{statistics.median(found):.2f}", AIMS.get(name, ""), *ratios)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
