"""All that is seen of one answer: gathered from a model, kept in a folder, read again from it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as save_arrays
from torch import Tensor

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.answer import LONGEST_ANSWER, Answerer
from layerfuse.explain.contributions import Contribution, LayerMeans, contributions
from layerfuse.explain.feature_maps import FeatureMap, feature_maps
from layerfuse.explain.reading import EncodedPrompt, layer_weights
from layerfuse.explain.trace import SINK, AnswerTrace, trace_answer
from layerfuse.files import write_text
from layerfuse.fusion import Deformable

FACTS = "inspect.json"
ARRAYS = "inspect.safetensors"
PICTURE = "picture.png"


@dataclass(frozen=True)
class Sink:
    """A visual token that draws attention whatever it shows.

    Attributes:
        token: its place among the visual tokens, from 0.
        ratio: the norm of its hidden state over the median of all, behind the block where it is
            largest.
    """

    token: int
    ratio: float


@dataclass(frozen=True)
class Facts:
    """What is said of one answer in words and single numbers.

    Attributes:
        model: its name.
        strategy: of the model.
        kind: of the strategy, such as `external direct`.
        question: as it was asked.
        answer: of the model.
        pieces: of the answer, one a token.
        log_probability: of the answer and its end, in nats.
        grid: (rows, columns) of the maps.
        compared_grid: (rows, columns) on which patches are compared.
        visual_tokens: N', as many as the LLM reads for the picture.
        blocks: LLM blocks whose attention was read.
        sink_threshold: what makes a sink: a norm of so many times the median.
        sinks: the visual tokens that are.
        map_names: of the feature maps; those of layers come first.
        layers: of the encoder, whose maps share one basis of colours too.
        weighted: what the strategy weighs, such as `layer 4`; empty where it weighs nothing.
        weights: of those, for this picture and question.
        openings: how far gates are open, by what they let through.
        levels: the layers in which detail was looked up; empty but for `deformable`.
        means: what stood in for layers, in words.
        contributions: of the layers, ascending.
    """

    model: str
    strategy: str
    kind: str
    question: str
    answer: str
    pieces: list[str]
    log_probability: float
    grid: tuple[int, int]
    compared_grid: tuple[int, int]
    visual_tokens: int
    blocks: int
    sink_threshold: float
    sinks: list[Sink]
    map_names: list[str]
    layers: list[int]
    weighted: list[str]
    weights: list[float]
    openings: dict[str, float]
    levels: list[str]
    means: str
    contributions: list[Contribution]


@dataclass(frozen=True)
class Inspection:
    """One answer, seen from all sides.

    Attributes:
        facts: in words and single numbers.
        picture: what the encoder saw.
        attention: (pieces, blocks, rows, columns) shares of each token's attention.
        attention_without_sinks: the same without what sinks got.
        shared_colours: (layers, rows, columns, 3) in 0..1, by one basis for all layers.
        own_colours: (maps, rows, columns, 3) in 0..1, each by its own basis.
        norms: (maps, rows, columns)
        cosines: (maps, cells, cells) on the grid on which patches are compared.
        points: (rows · columns, points, 2) places (x, y) in shares of the picture that each patch
            looks at in deformable attention; no points for other strategies.
        point_weights: (rows · columns, points), summing to one for each patch.
        point_levels: (points,) in which of `facts.levels` each point lies.
    """

    facts: Facts
    picture: Image.Image
    attention: np.ndarray
    attention_without_sinks: np.ndarray
    shared_colours: np.ndarray
    own_colours: np.ndarray
    norms: np.ndarray
    cosines: np.ndarray
    points: np.ndarray
    point_weights: np.ndarray
    point_levels: np.ndarray


@dataclass(frozen=True)
class LookedUp:
    """The points that deformable attention reads: see `Inspection`."""

    points: Tensor
    weights: Tensor
    levels: Tensor


def inspect_reading(
    answerer: Answerer,
    reading: EncodedPrompt,
    means: LayerMeans,
    *,
    name: str,
    max_new_tokens: int = LONGEST_ANSWER,
) -> Inspection:
    """Answer a question, and gather what can be seen of the answer.

    Args:
        answerer: the model.
        reading: the question and its picture.
        means: what stands in for layers that are taken away.
        name: of the model.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The answer from all sides.
    """
    trace = trace_answer(answerer, reading, max_new_tokens)
    maps = feature_maps(answerer, reading)
    shared = [one.shared for one in maps if one.shared is not None]
    looked_up = _looked_up(answerer, reading)
    of_layers = contributions(answerer, reading, trace, means, max_new_tokens=max_new_tokens)
    return Inspection(
        facts=_facts(
            answerer,
            reading,
            trace=trace,
            maps=maps,
            means=means,
            of_layers=of_layers,
            name=name,
        ),
        picture=reading.picture,
        attention=trace.on_grid().numpy(),
        attention_without_sinks=trace.on_grid(without_sinks=True).numpy(),
        shared_colours=torch.stack(shared).numpy(),
        own_colours=torch.stack([one.own for one in maps]).numpy(),
        norms=torch.stack([one.norms for one in maps]).numpy(),
        cosines=torch.stack([one.cosines() for one in maps]).numpy(),
        points=looked_up.points.numpy(),
        point_weights=looked_up.weights.numpy(),
        point_levels=looked_up.levels.numpy(),
    )


def _facts(
    answerer: Answerer,
    reading: EncodedPrompt,
    *,
    trace: AnswerTrace,
    maps: list[FeatureMap],
    means: LayerMeans,
    of_layers: list[Contribution],
    name: str,
) -> Facts:
    """What is said in words and single numbers."""
    config = answerer.model.config
    fusion = answerer.model.fusion
    highest = trace.norm_ratios.amax(dim=0)
    weights = layer_weights(reading, config.selection)
    levels: list[str] = []
    if isinstance(fusion, Deformable):
        levels = [f"layer {layer}" for layer in config.selection.layers]
    return Facts(
        model=name,
        strategy=config.strategy.name,
        kind=fusion.kind,
        question=reading.question,
        answer=trace.answer,
        pieces=trace.pieces,
        log_probability=trace.log_probability,
        grid=reading.grid,
        compared_grid=maps[0].compared_grid,
        visual_tokens=len(reading.image_places),
        blocks=trace.attention.shape[1],
        sink_threshold=SINK,
        sinks=[Sink(token, float(highest[token])) for token in trace.sinks],
        map_names=[one.name for one in maps],
        layers=list(reading.features.layers),
        weighted=list(weights),
        weights=list(weights.values()),
        openings=fusion.openings(),
        levels=levels,
        means=means.source,
        contributions=of_layers,
    )


@torch.inference_mode()
def _looked_up(answerer: Answerer, reading: EncodedPrompt) -> LookedUp:
    """Where each patch looks; no points but for `deformable`."""
    fusion = answerer.model.fusion
    cells = reading.grid[0] * reading.grid[1]
    if not isinstance(fusion, Deformable):
        return LookedUp(torch.zeros(cells, 0, 2), torch.zeros(cells, 0), torch.zeros(0).long())
    sampled = fusion.sampling_points(reading.features.to(answerer.model.fusion_dtype))
    # (1, N, heads, levels, points, 2)
    _, _, heads, levels, points, _ = sampled.locations.shape
    level_of_point = torch.arange(levels).view(1, -1, 1).expand(heads, levels, points)
    return LookedUp(
        points=sampled.locations[0].flatten(1, 3).float().cpu(),
        # The weights of a head sum to one.
        weights=sampled.weights[0].flatten(1, 3).float().cpu() / heads,
        levels=level_of_point.flatten(),
    )


def save(inspection: Inspection, folder: Path) -> None:
    """Write all that an inspection holds.

    Args:
        inspection: what was seen.
        folder: gets `inspect.json`, `inspect.safetensors` and `picture.png`; made if it is missing.

    Raises:
        LayerfuseError: the folder cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in vars(inspection).items():
        if isinstance(value, np.ndarray):
            arrays[name] = np.ascontiguousarray(value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inspection.picture.save(folder / PICTURE)
        # Not by `save_file`, whose file none but its owner may read
        (folder / ARRAYS).write_bytes(save_arrays(arrays))
    except OSError as error:
        raise LayerfuseError(f"cannot write to {folder}: {error}") from error
    # Last: a folder with this file holds the others.
    write_text(folder / FACTS, json.dumps(asdict(inspection.facts), indent=1) + "\n")


def load(folder: Path) -> Inspection:
    """Read what `save` wrote.

    Args:
        folder: of an inspection.

    Returns:
        What was seen.

    Raises:
        LayerfuseError: the folder holds no inspection, or a damaged one.
    """
    file = folder / FACTS
    if not file.is_file():
        raise LayerfuseError(f"no inspection in {folder}: `layerfuse inspect` makes one")
    try:
        facts = TypeAdapter(Facts).validate_json(file.read_text("utf-8"))
        arrays = load_file(folder / ARRAYS)
        with Image.open(folder / PICTURE) as opened:
            picture = opened.convert("RGB")
        inspection = Inspection(facts=facts, picture=picture, **arrays)
        _check_sizes(inspection)
        return inspection
    except (
        OSError,
        ValidationError,
        SafetensorError,
        UnidentifiedImageError,
        TypeError,
        ValueError,
    ) as error:
        raise LayerfuseError(
            f"the inspection in {folder} is damaged ({error}): run `layerfuse inspect` again"
        ) from error


def _check_sizes(inspection: Inspection) -> None:
    """Raise ValueError for words and arrays that are not of one inspection."""
    facts = inspection.facts
    cells = facts.grid[0] * facts.grid[1]
    compared = facts.compared_grid[0] * facts.compared_grid[1]
    maps = len(facts.map_names)
    expected = {
        "attention": (len(facts.pieces), facts.blocks, *facts.grid),
        "attention_without_sinks": (len(facts.pieces), facts.blocks, *facts.grid),
        "shared_colours": (len(facts.layers), *facts.grid, 3),
        "own_colours": (maps, *facts.grid, 3),
        "norms": (maps, *facts.grid),
        "cosines": (maps, compared, compared),
        "point_weights": (cells, len(inspection.point_levels)),
        "points": (cells, len(inspection.point_levels), 2),
    }
    for name, shape in expected.items():
        array: np.ndarray = vars(inspection)[name]
        if array.shape != shape:
            raise ValueError(f"{name} has the shape {array.shape}, and {FACTS} says {shape}")
