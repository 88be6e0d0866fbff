"""What is installed from a wheel: everything that the tool reads, found by name."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as pip lays it out."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("layerfuse-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(unpacked: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`layerfuse` from the wheel, in a folder that is no checkout."""
    first = f"import sys; sys.path.insert(0, {str(unpacked)!r})"
    start = f"{first}; from layerfuse_cli.app import app; app()"
    # isolated: neither the working directory nor PYTHONPATH leads to the sources
    command = [sys.executable, "-I", "-c", start, *arguments]
    return subprocess.run(command, cwd=unpacked, capture_output=True, text=True, check=False)


def test_data_and_types_are_inside(unpacked: Path) -> None:
    """Recipes with their templates, suites, published numbers, pages, and the mark of types."""
    package = unpacked / "layerfuse"
    assert (package / "py.typed").is_file()
    for folder in ("recipes", "recipes/templates"):
        expected = sorted(path.name for path in (ROOT / folder).iterdir())
        assert sorted(path.name for path in (package / folder).iterdir()) == expected
    sources = ROOT / "src"
    for path in sources.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (unpacked / path.relative_to(sources)).is_file(), path
    assert not (unpacked / "tests").exists()


def test_recipes_are_found_by_name(unpacked: Path) -> None:
    """Without a checkout; a name that there is not is answered with those that there are."""
    shown = run(unpacked, "show", "published-is-no-recipe")
    assert shown.returncode == 2
    assert "no recipe 'published-is-no-recipe'" in shown.stderr
    assert "quickstart" in shown.stderr

    listed = run(unpacked, "show", "llava-1.5-7b")
    assert listed.returncode == 0, listed.stderr
    assert "vicuna-7b" in listed.stdout


def test_the_wheel_knows_its_version_and_strategies(unpacked: Path) -> None:
    """The two commands that one tries first."""
    version = run(unpacked, "--version")
    fusions = run(unpacked, "list", "fusions")

    assert version.stdout.startswith("layerfuse 0.")
    assert "inject_cross" in fusions.stdout
