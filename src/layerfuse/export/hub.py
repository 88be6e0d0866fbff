"""A trained model with the code of its strategy: for transformers without layerfuse."""

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import Answerer
from layerfuse.export.elsewhere import check_elsewhere
from layerfuse.export.flat_modules import PACKAGE, Definition, flat_modules, flat_name
from layerfuse.export.model_card import model_card
from layerfuse.files import whole_folder
from layerfuse.model.config import FusionConfig
from layerfuse.model.instruction import BUNDLED, BUNDLED_NAME, SentenceSource
from layerfuse.model.processor import Processor
from layerfuse.model.vlm import FusionVLM

CLASSES = {
    "AutoConfig": FusionConfig,
    "AutoModelForImageTextToText": FusionVLM,
    "AutoProcessor": Processor,
}
"""by the automatic class of transformers that loads it; the configuration comes first, because
programs load the classes in this order, and a model needs that of its configuration"""
ENTRY = "modeling_layerfuse"
ENTRY_DOCSTRING = '''\
"""The classes that transformers loads: all from this one module.

Of every module that a settings file names, transformers makes a copy with all that it imports, and
the classes of one copy are not those of another.
"""
'''
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SETTINGS = ("config.json", "processor_config.json")
"""files that name the folder's code, and the strategy with its options"""
DISTRIBUTIONS = {"PIL": "pillow"}
"""packages that pip knows by another name than Python"""


def export_hub(model: Path, answerer: Answerer, output: Path) -> float:
    """Write a folder that brings its own code.

    Args:
        model: folder of the trained model.
        answerer: the trained model and its processor.
        output: a folder that is empty or not there.

    Returns:
        The largest difference of two logits to the trained model's, which is 0.

    Raises:
        LayerfuseError: the strategy is not layerfuse's own, or the folder does not load elsewhere
            with the same inputs and logits; nothing is written then.
    """
    # on the CPU, where another process computes the same
    # Any: transformers types `to` for its own classes only
    trained: Any = answerer.model.cpu()
    processor: Any = answerer.processor
    strategy = trained.config.strategy
    if strategy.module.__module__.split(".")[0] != PACKAGE:
        raise LayerfuseError(
            f"{strategy.name} is no strategy of layerfuse ({strategy.module.__module__}): its code "
            "cannot be written beside the model. Ship it as a package, whose import registers it"
        )
    code = flat_modules(
        [Definition(part.__module__, part.__name__) for part in CLASSES.values()],
        registered=Definition(strategy.module.__module__, strategy.module.__name__),
    )
    code[f"{ENTRY}.py"] = _entry_text()
    with whole_folder(output) as unfinished:
        trained.config.save_pretrained(unfinished)
        trained.generation_config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        # the files as they are: a model may be in another precision in memory
        for pattern in WEIGHTS:
            for file in model.glob(pattern):
                shutil.copyfile(file, unfinished / file.name)
        for name, text in code.items():
            (unfinished / name).write_text(text, "utf-8")
        is_bundled = _bundle_sentences(processor, unfinished)
        for name in SETTINGS:
            _complete_settings(unfinished / name, is_bundled)
        card = model_card(
            model,
            trained.config,
            strategy.module,
            name=output.name,
            needs_code=True,
            packages=needed_packages(code),
            is_bundled=is_bundled,
        )
        (unfinished / "README.md").write_text(card, "utf-8")
        return check_elsewhere(trained, processor, unfinished)


def _entry_text() -> str:
    """The module that settings files name."""
    imports: list[str] = []
    for part in CLASSES.values():
        imports.append(f"from .{flat_name(part.__module__)} import {part.__name__}\n")
    names = [part.__name__ for part in CLASSES.values()]
    return ENTRY_DOCSTRING + "\n" + "".join(imports) + f"\n__all__ = {names}\n"


def _bundle_sentences(processor: Processor, folder: Path) -> bool:
    """Copy a sentence encoder that lies in a folder of this machine, which nobody else has.

    Returns:
        Whether the folder has one now. One of a hub stays there.
    """
    source = processor.instruction
    if not isinstance(source, SentenceSource):
        return False
    place = Path(source.sentences.place)
    if not place.is_dir():
        return False
    # without a hub's own notes of a download
    shutil.copytree(place, folder / BUNDLED, ignore=shutil.ignore_patterns(".*"))
    return True


def _complete_settings(file: Path, is_bundled: bool) -> None:
    """Say in a settings file which classes read it, and where the sentence encoder is."""
    settings = json.loads(file.read_text("utf-8"))
    auto_map: dict[str, str] = {}
    for auto, part in CLASSES.items():
        auto_map[auto] = f"{ENTRY}.{part.__name__}"
    settings["auto_map"] = auto_map
    if is_bundled:
        settings["fusion"]["sentence_encoder"] = BUNDLED_NAME
    file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def needed_packages(code: dict[str, str]) -> list[str]:
    """What must be installed where exported code runs, as transformers finds it out.

    Args:
        code: the text of each module.

    Returns:
        Names of packages as pip knows them, sorted. What is imported inside of a `try` is not
        needed by all.
    """
    names: set[str] = set()
    for text in code.values():
        waiting: list[ast.AST] = [ast.parse(text)]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.Try):
                continue
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.split(".")[0])
            waiting.extend(ast.iter_child_nodes(node))
    foreign = names - set(sys.stdlib_module_names)
    return sorted(DISTRIBUTIONS.get(name, name) for name in foreign)
