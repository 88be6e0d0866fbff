"""The table of fusion strategies, counted for one encoder and one LLM on the meta device."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from transformers import PreTrainedConfig

from layerfuse.cost.flops import Known, count, flops, text_config, tokens_of, vision_config
from layerfuse.errors import LayerfuseError
from layerfuse.fusion import FUSIONS, Fusion
from layerfuse.fusion.fixed_mix import FixedMix
from layerfuse.model.config import configure
from layerfuse.recipe.model_source import ModelSource
from layerfuse.tables import NO_BREAK, Heading, print_fitted
from layerfuse.vision.selection import Selection
from layerfuse.vision.towers import native_size

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "image_size": 336,
    "patch_size": 14,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_size": 1024,
    "intermediate_size": 4096,
}
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


Rows = tuple[list[Row], dict[str, str]]
"""the strategies, and why the others cannot be built for the pair"""


def rows(vision: PreTrainedConfig, text: PreTrainedConfig) -> Rows:
    """Build every registered strategy with its default options and example layers, and count it.

    Args:
        vision: the encoder; the image is of its own size.
        text: the LLM.

    Returns:
        One row per strategy, `single` first; and the reasons of those that do not fit, by name.
    """
    counted: list[Row] = []
    misfits: dict[str, str] = {}
    known: Known = {}
    single_parameters = 0
    single_flops = 0
    side = native_size(vision)[0]
    # `single` comes first because all others are shown as what they cost beyond it.
    for name in sorted(FUSIONS, key=lambda other: other != "single"):
        layers: Any = FUSIONS[name][1].example(vision.num_hidden_layers)
        try:
            config = configure(vision, text, layers, {"name": name})
        except LayerfuseError as error:
            misfits[name] = str(error)
            continue
        model, parameters = count(config)
        cost = flops(model, side, known, ("fusion", "llm"))
        total_flops = cost["fusion"] + cost["llm"]
        if name == "single":
            single_parameters = parameters["fusion"]
            single_flops = total_flops
        row = Row(
            name=name,
            layers=_layers_text(config.selection),
            tokens=tokens_of(model, side),
            parameters=parameters["fusion"] - single_parameters,
            flops=total_flops - single_flops,
        )
        counted.append(row)
    return counted, misfits


def _layers_text(selection: Selection) -> str:
    """Short text of a selection: runs of layers as ranges, groups between bars."""
    groups = [group for group in selection.groups if len(group) > 1]
    if not groups:
        groups = [selection.layers]
    texts = []
    for group in groups:
        first, last = min(group), max(group)
        is_run = list(group) == list(range(first, last + 1))
        if is_run and len(group) > 2:
            texts.append(f"{first}-{last}")
        else:
            texts.append(",".join(map(str, group)))
    return "|".join(texts)


def list_fusions(encoder: str, llm: str, console: Console | None = None) -> Rows:
    """Print the table of strategies for an encoder and an LLM.

    Args:
        encoder: a name of `KNOWN`, a local model, a hub id or a folder.
        llm: the same for the LLM.
        console: where to print; the terminal by default.

    Returns:
        What `rows` returns.

    Raises:
        LayerfuseError: a configuration cannot be read, or a model is not of its kind.
    """
    vision = vision_config(KNOWN.get(encoder) or ModelSource(model=encoder))
    text = text_config(KNOWN.get(llm) or ModelSource(model=llm))
    counted, misfits = rows(vision, text)
    if console is None:
        console = Console()
    show(counted, misfits, console)
    console.print(
        f"For {encoder} at the {native_size(vision)[0]} pixels of its configuration and {llm}, "
        "default options, example layers; extra: beyond `single`. FLOPs: "
        "matrix products of fusion and LLM in one forward of an image and its text; gathers of "
        "`deformable` are not products and not counted. Ships as: `folds` into stock LLaVA "
        "(`export --to llava`); `hub`: with its own code, all of it in `get_image_features`, "
        "where servers look; `transformers only`: servers would leave out a part."
    )
    return counted, misfits


def ships_as(module: type[Fusion[Any]]) -> str:
    """What becomes of a trained model of a strategy outside of layerfuse.

    Args:
        module: the strategy.

    Returns:
        `folds` into stock LLaVA; `hub`, with its own code, where all that pictures add is what
        servers read; or `transformers only`, with its own code, of which they would leave out a
        part.
    """
    if issubclass(module, FixedMix):
        return "folds"
    if module.kind.startswith("internal") or module.reads != "nothing":
        return "transformers only"
    return "hub"


def show(counted: list[Row], misfits: dict[str, str], console: Console) -> None:
    """Print the rows as a table, and below it what does not fit.

    Args:
        counted: the strategies.
        misfits: why others cannot be built, by name.
        console: where to print.
    """
    headings = [
        Heading("name"),
        Heading("kind"),
        Heading("published as"),
        Heading("ships as"),
        Heading("layers"),
        Heading("tokens", is_number=True),
        Heading("extra parameters", is_number=True),
        Heading("extra GFLOPs", is_number=True),
    ]
    lines = []
    for row in counted:
        module = FUSIONS[row.name][1]
        # Millions would show the few weights of a mix as nothing.
        if abs(row.parameters) < 1e5:
            parameters = f"{row.parameters:+,}"
        else:
            parameters = f"{row.parameters / 1e6:+,.2f}{NO_BREAK}M"
        cells = [
            row.name,
            module.kind,
            module.paper,
            ships_as(module),
            row.layers,
            str(row.tokens),
            parameters,
            f"{row.flops / 1e9:+,.1f}",
        ]
        lines.append(cells)
    print_fitted(console, headings, lines)
    for name, reason in misfits.items():
        console.print(f"{name}: not for this pair by default: {reason}", soft_wrap=True)
