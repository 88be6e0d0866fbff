"""What the documentation says is true: snippets run, generated pages are fresh, links exist."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from docs.generate import pages
from layerfuse import __version__
from layerfuse.cli import app
from layerfuse.fusion import FUSIONS
from layerfuse.recipe.schema import Recipe
from tests import tiny
from tests.random_prompts import prompts

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
TEXTS += sorted((ROOT / "docs").rglob("*.md"))


def snippets(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text("utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize(("path", "text"), pages().items(), ids=[p.name for p in pages()])
def test_generated_pages_are_fresh(path: Path, text: str) -> None:
    assert path.read_text("utf-8") == text, "run `make docs`"


@pytest.mark.real
@pytest.mark.usefixtures("local_models")
def test_python_snippets_of_the_readme_run(tmp_path: Path) -> None:
    """The second snippet loads the model that the first one made."""
    from PIL import Image

    from layerfuse.model.pretrained import compose_processor
    from layerfuse.model.vlm import FusionVLM

    compose, load = snippets(ROOT / "README.md", "python")
    names: dict[str, Any] = {}
    exec(compose, names)
    model: Any = names["model"]
    assert isinstance(model, FusionVLM)
    config: Any = model.config
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    parts = ("dinov2-small", "smollm2-135m-instruct")
    processor = compose_processor(*parts, config, chat_template=None, image_token=None)
    processor.save_pretrained(folder)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "picture.png")
    command = [sys.executable, "-c", f"folder = {str(folder)!r}\n{load}"]  # knows nothing yet
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr


def test_the_readme_recipe_is_valid() -> None:
    (text,) = snippets(ROOT / "README.md", "yaml")
    recipe = Recipe.model_validate(yaml.safe_load(text))
    assert len(recipe.all_arms()) == 2


def test_the_arms_of_the_page_on_looking_are_valid() -> None:
    (readme,), (text,) = (snippets(ROOT / name, "yaml") for name in ("README.md", "docs/look.md"))
    recipe = Recipe.model_validate({**yaml.safe_load(readme), **yaml.safe_load(text)})
    layers = [arm.layers for arm in recipe.all_arms()]
    assert layers == [f"{k}@{recipe.similarity}" for k in ("similarity:3", "similarity:2:groups")]


def test_the_strategy_of_the_concepts_page_works() -> None:
    (text,) = snippets(ROOT / "docs" / "concepts.md", "python")
    try:
        exec(compile(text, "my_fusion", "exec"), {"__name__": "my_fusion"})
        model = tiny.model("plain_sum", layers=[1, 3])
        assert model(**prompts(model, [1, 2])).logits.shape[0] == 2
    finally:
        FUSIONS.pop("plain_sum", None)


def test_shell_snippets_name_verbs_recipes_and_targets_that_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    root: Any = get_command(app)
    verbs = root.commands
    for path in TEXTS:
        for line in "\n".join(snippets(path, "bash")).splitlines():
            words = line.split()
            if words and words[0] == "make":
                assert words[1] in targets
            elif words:
                assert words[0] == "layerfuse"
                assert words[1] in verbs
                for word in words:
                    assert not word.startswith("recipes/") or (ROOT / word).exists()


def test_the_readme_table_lists_every_strategy() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert [n for n in FUSIONS if f"| `{n}` |" not in text] == []


def test_version_is_in_the_changelog() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_help_is_fast() -> None:
    """Under half a second of processor time, which other processes of a busy machine, unlike the
    time on the clock, hardly lengthen. The best of ten."""
    command = [sys.executable, "-m", "layerfuse.cli", "--help"]
    environment = {**os.environ, "COLUMNS": "90"}
    fastest = float("inf")
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        fastest = min(fastest, seconds)
        if fastest < 0.5:
            break
    assert fastest < 0.5


def test_every_module_has_a_name_of_its_own() -> None:
    """A message or a traceback that names a module names one file."""
    modules = (ROOT / "src" / "layerfuse").rglob("*.py")
    names = sorted(path.stem for path in modules if path.stem != "__init__")
    assert names == sorted(set(names))
    assert "run" not in names
