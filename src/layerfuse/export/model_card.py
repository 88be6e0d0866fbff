"""The README of an exported model: what it is, how it is loaded, and what is known of it.

What a study recorded beside the model is read; what nobody recorded is said to be so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layerfuse.errors import LayerfuseError
from layerfuse.fusion import Fusion
from layerfuse.local_models.registry import MODELS
from layerfuse.model.config import FusionConfig

NOT_RECORDED = "Not recorded.\n"
LOAD = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}"{trust})
processor = AutoProcessor.from_pretrained("{name}"{trust})
{inputs}
output = model.generate(**inputs, max_new_tokens=64, do_sample=False{tokenizer})
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
CHAT_INPUTS = """\
message = {
    "role": "user",
    "content": [
        {"type": "image", "image": Image.open("picture.png")},
        {"type": "text", "text": "What is in the picture?"},
    ],
}
inputs = processor.apply_chat_template(
    [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)"""
SENTENCE_INPUTS = """\
# not `apply_chat_template`, which does not embed the question
messages = [{"role": "user", "content": "<image>What is in the picture?"}]
inputs = processor.inputs([messages], [Image.open("picture.png")])"""
RECIPE_FIELDS = (
    "name",
    "description",
    "start_from",
    "encoder",
    "llm",
    "image_aspect_ratio",
    "dtype",
    "closed_answers",
    "stages",
)
"""what of a recipe is about the training of every arm"""
VERSIONS = ("layerfuse", "commit", "torch", "transformers", "device", "dtype")
"""what of a study's environment.json the card repeats"""


@dataclass(frozen=True)
class StudyFiles:
    """What a study recorded of a model, as plain values; None where it did not."""

    # Any: what stands in JSON and YAML files
    recipe: Any
    data: Any
    environment: Any
    result: Any
    num_answers: int | None
    """questions of the test"""

    @classmethod
    def beside(cls, model: Path) -> "StudyFiles":
        """What lies beside a model in `<study>/arms/<run>/model`.

        Args:
            model: the model's folder, of a study or of none.

        Raises:
            LayerfuseError: a file is damaged; it is named.
        """
        run = model.resolve().parent
        study = run.parent.parent
        answers = None
        predictions = run / "predictions.jsonl"
        if predictions.is_file():
            with predictions.open("rb") as lines:
                answers = sum(1 for _ in lines)
        return cls(
            recipe=_plain(study / "recipe.yaml"),
            data=_plain(study / "data.json"),
            environment=_plain(study / "environment.json"),
            result=_plain(run / "result.json"),
            num_answers=answers,
        )

    def named(self, part: str) -> str | None:
        """The name by which the recipe gives the `encoder` or the `llm`."""
        if self.recipe is None or self.recipe.get("start_from") is not None:
            return None
        source: dict[str, Any] = self.recipe.get(part) or {}
        return source.get("model")


# Any: plain values
def _plain(file: Path) -> Any:
    """What a JSON or YAML file holds; None if it is not there."""
    if not file.is_file():
        return None
    try:
        # JSON is YAML, but is read a hundred times faster as what it is
        text = file.read_text("utf-8")
        return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise LayerfuseError(
            f"cannot read {file}, from which the model card is written: {error}. Put the file in "
            "order, or move the model's folder elsewhere to export it without what its study "
            "recorded"
        ) from error


def serving(fusion: type[Fusion[Any]]) -> str:
    """What servers can do with a strategy's model that brings its own code.

    Args:
        fusion: the strategy.

    Returns:
        A sentence or two.
    """
    if fusion.kind.startswith("internal"):
        return (
            "Only transformers runs this model: servers such as vLLM read nothing but "
            "`get_image_features().pooler_output`, and would leave out what goes into the LLM's "
            "blocks: answers would be worse, without an error."
        )
    if fusion.reads != "nothing":
        return (
            "Only transformers runs this model: servers such as vLLM give `get_image_features` "
            "pictures alone, and the question weighs the layers here: answers would be worse, or "
            "there would be none."
        )
    return (
        "Everything that the pictures add is in `get_image_features().pooler_output`, which is all "
        "that the Transformers backends of vLLM and SGLang read of a model: they lose nothing of "
        "its fusion. This folder was not tried with them, and they also ask for an `AutoModel`, a "
        "class without the LLM's head, which it does not have."
    )


def model_card(
    model: Path,
    config: FusionConfig,
    fusion: type[Fusion[Any]],
    *,
    name: str,
    needs_code: bool,
    packages: Sequence[str] = (),
    is_bundled: bool = False,
) -> str:
    """The text of README.md.

    Args:
        model: folder of the trained model; what stands beside it in a study is read.
        config: of the trained model.
        fusion: its strategy.
        name: of the exported folder.
        needs_code: whether the folder brings its own code.
        packages: what must be installed for that code.
        is_bundled: whether the folder holds the sentence encoder.

    Raises:
        LayerfuseError: a file of the study is damaged.
    """
    recorded = StudyFiles.beside(model)
    reads_sentence = fusion.reads == "sentence"
    inputs = SENTENCE_INPUTS if reads_sentence else CHAT_INPUTS
    load = LOAD.format(
        name=name,
        trust=", trust_remote_code=True" if needs_code else "",
        inputs=inputs,
        # which ends of several tokens take
        tokenizer="" if needs_code else ", tokenizer=processor.tokenizer",
    )
    card = [
        _front_matter(recorded, needs_code),
        f"# {name}\n",
        f"A vision encoder ({config.vision_config.model_type}), a fusion of its layers and an LLM "
        f"({config.text_config.model_type}), trained with layerfuse.\n",
        f"* Layers {config.vision_layers}, positions in `hidden_states`: 0 are the embeddings, "
        f"{config.selection.depth} the last block.",
        f"* Fusion `{config.strategy.name}` ({fusion.kind}; {fusion.paper}): {fusion.summary}.\n",
        load,
    ]
    if needs_code:
        card.append(f"Its code needs {', '.join(packages)}.\n")
        card.append(serving(fusion) + "\n")
    if reads_sentence:
        card.append(_sentences_text(config, is_bundled))
    card += [
        "## How it was trained\n",
        _training_text(recorded),
        "## Data\n",
        _data_text(recorded),
        "## What it scored\n",
        _scores_text(recorded),
        "## Licence\n",
        _licence_text(recorded, config.strategy.options.sentence_encoder if is_bundled else None),
    ]
    return "\n".join(card) + "\n"


def _front_matter(recorded: StudyFiles, needs_code: bool) -> str:
    """What the hub reads of a card."""
    tags = ["layerfuse", "custom_code"] if needs_code else ["layerfuse"]
    facts: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": tags,
    }
    bases: list[str] = []
    for part in ("encoder", "llm"):
        name = recorded.named(part)
        if name is not None and name.count("/") == 1 and not Path(name).exists():
            bases.append(name)
    if bases:
        facts["base_model"] = bases
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def _sentences_text(config: FusionConfig, is_bundled: bool) -> str:
    """What guides the model, and what that needs."""
    encoder = config.strategy.options.sentence_encoder
    place = f"`{encoder}`"
    if is_bundled:
        place = "the one in the folder `sentence_encoder`"
    return (
        "The question guides the fusion. Its processor embeds it with a sentence encoder, "
        f"{place}, which needs `pip install sentence-transformers`.\n"
    )


def _training_text(recorded: StudyFiles) -> str:
    """The recipe without what only its machine knows, the arm, and what it was trained by."""
    parts: list[str] = []
    if recorded.recipe is not None:
        kept: dict[str, Any] = {}
        for key in RECIPE_FIELDS:
            if recorded.recipe.get(key) is not None:
                kept[key] = _without_folders(recorded.recipe[key])
        if recorded.result is not None:
            kept["arm"] = {
                "name": recorded.result["arm"],
                "layers": recorded.result["layers"],
                "fusion": _without_folders(recorded.result["fusion"]),
                "seed": recorded.result["seed"],
            }
        parts.append(f"```yaml\n{yaml.safe_dump(kept, sort_keys=False)}```\n")
    if recorded.environment is not None:
        versions: list[str] = []
        for key in VERSIONS:
            if key in recorded.environment:
                versions.append(f"{key} {recorded.environment[key]}")
        parts.append(f"With {', '.join(versions)}.\n")
    return "\n".join(parts) or NOT_RECORDED


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


def _data_text(recorded: StudyFiles) -> str:
    """How much data each stage and the test had."""
    if recorded.data is None:
        return NOT_RECORDED
    lines = ["| | samples | pictures | questions |", "|---|---|---|---|"]
    for source in recorded.data:
        lines.append(
            f"| {source['source']} | {source['samples']:,} | {source['pictures']:,} | "
            f"{source['questions']:,} |"
        )
    return "\n".join(lines) + "\n"


def _scores_text(recorded: StudyFiles) -> str:
    """What the run scored on the test of its study."""
    if recorded.result is None:
        return NOT_RECORDED
    scores = recorded.result["scores"]
    lines = ["| questions | right |", "|---|---|", f"| all families | {scores['mean']:.3f} |"]
    for category, score in sorted(scores["categories"].items()):
        lines.append(f"| {category} | {score:.3f} |")
    lines.append("")
    if recorded.num_answers is not None:
        lines.append(f"{recorded.num_answers:,} questions of the study's own test, one training.\n")
    return "\n".join(lines)


def _licence_text(recorded: StudyFiles, sentence_encoder: str | None) -> str:
    """What is known of licences.

    Args:
        recorded: of the study.
        sentence_encoder: by the name that the model has it, if the folder holds it.
    """
    names = {"encoder": recorded.named("encoder"), "LLM": recorded.named("llm")}
    if sentence_encoder is not None:
        names["sentence encoder"] = sentence_encoder
    lines = ["The weights follow from these:\n"]
    for part, name in names.items():
        if name is None:
            lines.append(f"* {part}: not recorded")
        elif name in MODELS:
            lines.append(f"* {part} `{name}`: {MODELS[name].licence}")
        else:
            lines.append(f"* {part} `{_without_folders(name)}`: licence not recorded")
    lines.append("* training data: licence not recorded")
    lines.append("\nThe code that layerfuse writes is Apache-2.0.")
    return "\n".join(lines)
