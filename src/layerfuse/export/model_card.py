"""The README of an exported model: what it is, how it is loaded, and what is known of it."""

import json
from pathlib import Path
from typing import Any

import yaml

from layerfuse.fusion import Fusion
from layerfuse.model.config import FusionConfig

TRUSTED = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
```
"""
STOCK = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```
"""


def serving(fusion: type[Fusion[Any]]) -> str:
    """What servers can do with a strategy's model that brings its own code.

    Args:
        fusion: the strategy.

    Returns:
        A sentence.
    """
    if fusion.kind.startswith("internal"):
        return (
            "Only transformers runs this model: servers such as vLLM read nothing but "
            "`get_image_features().pooler_output`, and would leave out what goes into the LLM's "
            "blocks without an error."
        )
    if fusion.reads != "nothing":
        return (
            "Only transformers runs this model: servers such as vLLM give `get_image_features` "
            "pictures alone, and the question weighs the layers here."
        )
    return (
        "Everything that the pictures add is in `get_image_features().pooler_output`, which is "
        "what the Transformers backends of vLLM and SGLang read."
    )


def model_card(
    model: Path,
    config: FusionConfig,
    fusion: type[Fusion[Any]],
    *,
    name: str,
    needs_code: bool,
) -> str:
    """The text of README.md.

    Args:
        model: folder of the trained model; what stands beside it in a study is read.
        config: of the trained model.
        fusion: its strategy.
        name: of the exported folder.
        needs_code: whether the folder brings its own code.
    """
    load = TRUSTED if needs_code else STOCK
    card = [
        _front_matter(needs_code),
        f"# {name}\n",
        f"A vision encoder ({config.vision_config.model_type}), a fusion of its layers and an LLM "
        f"({config.text_config.model_type}), trained with layerfuse.\n",
        f"* Layers {config.vision_layers}, positions in `hidden_states`: 0 are the embeddings, "
        f"{config.selection.depth} the last block.",
        f"* Fusion `{config.strategy.name}` ({fusion.kind}; {fusion.paper}): {fusion.summary}.\n",
        load.format(name=name),
    ]
    if needs_code:
        card.append(serving(fusion) + "\n")
    if fusion.reads == "sentence":
        card.append("The processor needs `pip install sentence-transformers`.\n")
    card += [
        "## How it was trained\n",
        _recipe_text(model),
        "## What it scored\n",
        _scores_text(model),
        "## Licence\n",
        "That of the weights follows from the encoder, the LLM and the data above, and is not "
        "recorded. The code is Apache-2.0.",
    ]
    return "\n".join(card) + "\n"


def _front_matter(needs_code: bool) -> str:
    """What the hub reads of a card."""
    tags = ["layerfuse", "custom_code"] if needs_code else ["layerfuse"]
    facts = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": tags}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def _recipe_text(model: Path) -> str:
    """The recipe of the study that the model is from, without what only its machine knows."""
    # <study>/arms/<run>/model
    file = model.resolve().parent.parent.parent / "recipe.yaml"
    if not file.is_file():
        return "Not recorded.\n"
    recipe = yaml.safe_load(file.read_text("utf-8"))
    kept: dict[str, Any] = {}
    for key in ("name", "description", "start_from", "encoder", "llm", "stages"):
        if recipe.get(key) is not None:
            kept[key] = _without_folders(recipe[key])
    return f"```yaml\n{yaml.safe_dump(kept, sort_keys=False)}```\n"


# Any: a part of a recipe, of any shape
def _without_folders(node: Any) -> Any:
    """A part of a recipe with the names of files and folders alone, and without empty fields."""
    if isinstance(node, dict):
        fields: dict[str, Any] = {**node}
        return {key: _without_folders(value) for key, value in fields.items() if value is not None}
    if isinstance(node, list):
        return [_without_folders(value) for value in node]
    if isinstance(node, str) and Path(node).is_absolute():
        return Path(node).name
    return node


def _scores_text(model: Path) -> str:
    """What the run scored on the test of its study."""
    file = model.resolve().parent / "result.json"
    if not file.is_file():
        return "Not recorded.\n"
    scores = json.loads(file.read_text("utf-8"))["scores"]
    lines = ["| questions | right |", "|---|---|", f"| all families | {scores['mean']:.3f} |"]
    for category, score in sorted(scores["categories"].items()):
        lines.append(f"| {category} | {score:.3f} |")
    return "\n".join(lines) + "\n"
