"""What all verbs share: messages, tracebacks and the version."""

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from typer.testing import CliRunner

import layerfuse.cost.recipe_table
from layerfuse import __version__
from layerfuse.errors import LayerfuseError
from layerfuse.export.formats import Format
from layerfuse.released.importing import STOCK
from layerfuse.released.layouts import LAYOUTS
from layerfuse_cli.app import app, export, import_release

# A wrong value, a file, a GPU out of memory, a package: whatever layerfuse does not explain.
BUGS = [KeyError, ValueError, OSError, torch.OutOfMemoryError, ImportError]


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `layerfuse show` raise an error."""

    def show(*_: object) -> None:
        raise error

    monkeypatch.setattr(layerfuse.cost.recipe_table, "show", show)


def test_what_the_user_can_correct_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(LayerfuseError("no such layer"), monkeypatch)

    ended = CliRunner().invoke(app, ["show", "recipe.yaml"])

    # 2 is the code of wrong usage, 1 of a bug
    assert ended.exit_code == 2
    assert "error: no such layer" in ended.output
    assert "Traceback" not in ended.output


def test_debug_raises_what_would_be_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(LayerfuseError("no such layer"), monkeypatch)

    ended = CliRunner().invoke(app, ["--debug", "show", "recipe.yaml"])

    assert type(ended.exception) is LayerfuseError
    assert "error:" not in ended.output


@pytest.mark.parametrize("kind", BUGS)
def test_any_other_error_keeps_its_type_and_traceback(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(kind("layer"), monkeypatch)

    ended = CliRunner().invoke(app, ["show", "recipe.yaml"])

    assert type(ended.exception) is kind
    assert ended.exit_code == 1


def test_version() -> None:
    ended = CliRunner().invoke(app, ["--version"])

    assert ended.exit_code == 0
    assert ended.output.strip() == f"layerfuse {__version__}"


def test_modules_of_the_user_are_imported_before_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a recipe with a strategy of the user's own could not be read."""
    monkeypatch.chdir(tmp_path)
    # The verb puts the working directory on the path, which must not last
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = tmp_path / "my_broken_strategies.py"
    module.write_text("raise ImportError('needs a package')")

    ended = CliRunner().invoke(app, ["show", "none.yaml", "--import", "my_broken_strategies"])

    assert ended.exit_code == 2
    assert "error: --import my_broken_strategies: needs a package" in ended.output


@pytest.mark.parametrize("name", ["./badmod.py", "", ".relative", "a..b", "my-fusion", "/a/b.py"])
def test_an_import_that_is_no_name_of_a_module(name: str) -> None:
    """Python would read a path as a relative import and raise a TypeError."""
    ended = CliRunner().invoke(app, ["show", "none.yaml", "--import", name])

    assert ended.exit_code == 2
    assert f"--import {name!r} is no name of a module" in ended.output
    assert "my_fusion for my_fusion.py" in ended.output


def test_layouts_and_formats_are_those_that_there_are() -> None:
    """The command line names them a second time, so that its help need not import them."""
    layouts = get_args(get_type_hints(import_release)["layout"])
    formats = get_args(get_type_hints(export)["to"])

    assert layouts == (*LAYOUTS, STOCK)
    assert formats == get_args(Format)


def test_help_and_wrong_usage_do_not_wait_for_layerfuse() -> None:
    """Its import takes seconds."""
    code = (
        "import sys; from typer.testing import CliRunner; from layerfuse_cli.app import app\n"
        "for words in (['--help'], ['--version'], ['study', '--help'], ['study', '--nothing']):\n"
        "    ended = CliRunner().invoke(app, words)\n"
        "    print(ended.exit_code, 'layerfuse' in sys.modules)\n"
    )

    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert process.stdout.splitlines() == ["0 False", "0 False", "0 False", "2 False"]
