"""The table of fusion strategies, counted for one encoder and one LLM on the meta device."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedConfig

from layerfuse.cost.flops import Known, count, flops, text_config, tokens_of, vision_config
from layerfuse.fusion import FUSIONS
from layerfuse.model.config import configure
from layerfuse.recipe.schema import ModelSource
from layerfuse.vision.selection import Selection

CLIP: dict[str, Any] = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
CLIP |= {"num_hidden_layers": 24, "num_attention_heads": 16}
CLIP |= {"hidden_size": 1024, "intermediate_size": 4096}
KNOWN = {
    "clip-l-336": ModelSource(model="openai/clip-vit-large-patch14-336", config=CLIP),
    # transformers' defaults for this type are the shape of Llama 7B
    "vicuna-7b": ModelSource(model="lmsys/vicuna-7b-v1.5", config={"model_type": "llama"}),
}
"""shapes that need no files: LLaVA-1.5's encoder and LLM"""


@dataclass(frozen=True)
class Row:
    """One strategy with its example layers, against `single`."""

    name: str
    layers: str
    tokens: int
    parameters: int
    """of the fusion beyond `single`'s"""
    flops: float
    """of one forward of fusion and LLM beyond `single`'s, one image and the text of `show`"""


Rows = tuple[list[Row], dict[str, str]]  # and why the others cannot be built for the pair


def rows(vision: PreTrainedConfig, text: PreTrainedConfig) -> Rows:
    """Every registered strategy with its default options and example layers, counted by building
    it, with an image of the encoder's own size."""
    found: list[Row] = []
    misfits: dict[str, str] = {}
    known: Known = {}
    base = (0, 0)
    for name in sorted(FUSIONS, key=lambda n: n != "single"):
        layers: Any = FUSIONS[name][1].example(vision.num_hidden_layers)
        try:
            config = configure(vision, text, layers, {"name": name})
        except ValueError as error:
            misfits[name] = str(error)
            continue
        model, counts = count(config)
        cost = flops(model, vision.image_size, known, ("fusion", "llm"))
        own = counts["fusion"], sum(cost.values())
        base = own if name == "single" else base
        tokens = tokens_of(model, vision.image_size)
        extra = own[0] - base[0], own[1] - base[1]
        found.append(Row(name, _text(config.selection), tokens, *extra))
    return found, misfits


def _text(selection: Selection) -> str:
    """Short text of a selection: runs of layers as ranges, groups between bars."""
    whole = [g for g in selection.groups if len(g) > 1] or [selection.layers]
    shown = []
    for group in whole:
        first, last = min(group), max(group)
        run = len(group) > 2 and list(group) == list(range(first, last + 1))
        shown.append(f"{first}-{last}" if run else ",".join(map(str, group)))
    return "|".join(shown)


def list_fusions(encoder: str, llm: str, console: Console | None = None) -> Rows:
    """Print the table of strategies for an encoder and an LLM: names of `KNOWN`, local models, hub
    ids or folders. Raises OSError if a configuration cannot be read. Returns the rows."""
    vision = vision_config(KNOWN.get(encoder) or ModelSource(model=encoder))
    text = text_config(KNOWN.get(llm) or ModelSource(model=llm))
    found = rows(vision, text)
    console = console or Console()
    show(*found, console)
    console.print(
        f"For {encoder} at the {vision.image_size} pixels of its configuration and {llm}, default "
        "options, example layers; extra: beyond `single`. FLOPs: "
        "matrix products of fusion and LLM in one forward of an image and its text; gathers of "
        "`deformable` are not products and not counted.",
        soft_wrap=True,
    )
    return found


def show(found: list[Row], misfits: dict[str, str], console: Console) -> None:
    """Print the rows as a table, and below it what does not fit."""
    texts = (Column("name", no_wrap=True), "kind", "published as", "layers")
    numbers = ("tokens", "extra parameters", "extra GFLOPs")
    right = [Column(name, justify="right", no_wrap=name != "tokens") for name in numbers]
    table = Table(*texts, *right, box=None, padding=(0, 1))
    for r in found:
        module = FUSIONS[r.name][1]
        few = abs(r.parameters) < 1e5
        parameters = f"{r.parameters:+,}" if few else f"{r.parameters / 1e6:+,.2f} M"
        cells = (r.layers, str(r.tokens), parameters, f"{r.flops / 1e9:+,.1f}")
        table.add_row(r.name, module.kind, module.paper, *cells)
    console.print(table)
    for name, why in misfits.items():
        console.print(f"{name}: not for this pair by default: {why}", soft_wrap=True)
