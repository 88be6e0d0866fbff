"""The command line of one process of a run says what the process that starts it means."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from layerfuse.recipe.reader import load_recipe
from layerfuse.study import execute
from layerfuse.study.execute import ProcessArguments
from tests.studies import write_recipe


@pytest.mark.parametrize("modules", [(), ("my_fusion",), ("my_fusion", "package.other")])
def test_what_is_written_is_read_again(modules: tuple[str, ...], tmp_path: Path) -> None:
    arguments = ProcessArguments(
        study=tmp_path / "a study",
        run_folder="arms/one.seed0.0123",
        modules=modules,
    )

    command_line = arguments.to_command_line()

    assert ProcessArguments.from_command_line(command_line) == arguments


def test_the_launcher_starts_the_module_with_these_arguments(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def note(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", note)
    loaded = load_recipe(write_recipe(tmp_path, recipe))

    execute.launch(loaded, tmp_path, "arms/one", ["my_fusion"])

    (command,) = commands
    # Behind the launcher's own arguments and the module's name.
    place = command.index("layerfuse.study.execute") + 1
    arguments = ProcessArguments.from_command_line(command[place:])
    assert arguments == ProcessArguments(tmp_path, "arms/one", ("my_fusion",))


def test_an_argument_too_many_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A module without its option must not be dropped without a word."""
    with pytest.raises(SystemExit):
        ProcessArguments.from_command_line(["study", "arms/one", "my_fusion"])

    assert "unrecognized arguments: my_fusion" in capsys.readouterr().err
