"""Synthetic question-and-answer scenes in the LLaVA format.

A scene is a 224 x 224 picture with a group of equal objects, a card with a letter beside it, a
patterned background and a tiny mark. Eight families of questions, from local colour to small
print, make different encoder depths useful. Answers are dealt out evenly over a split. Eight of the
64 (colour, shape) pairs are held out: no train split shows or names them. Answers on presence,
colour and shape tell something about each other: score exchanges one at a time.
"""

import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from layerfuse.data import drawing
from layerfuse.data.drawing import SIZE
from layerfuse.errors import LayerfuseError

Split = Literal["train", "test"]
VERSION = 2
_TABLE = (
    ("colour", "General", "red orange yellow green blue purple pink black", "What colour?"),
    ("shape", "General", "circle square triangle star heart diamond ring moon", "What shape?"),
    ("count", "Vision-centric", "1 2 3 4 5 6", "How many?|How many objects?"),
    ("position", "Vision-centric", "left right top bottom", "Where is the card?|On which side?"),
    ("letter", "Chart&OCR", "A E L M O S T X", "Which letter?|What does the card say?"),
    ("texture", "Fine-grained", "plain horizontal vertical diagonal dots checks", "What pattern?"),
    ("detail", "Fine-grained", "dot cross line none", "Which tiny mark?|What is the tiny mark?"),
    ("presence", "Hallucination", "yes no", "Is there {}?|Do you see {}?"),
)
FAMILIES: dict[str, str] = {family: category for family, category, _, _ in _TABLE}
ANSWERS = {family: tuple(answers.split()) for family, _, answers, _ in _TABLE}
QUESTIONS = {family: tuple(wordings.split("|")) for family, _, _, wordings in _TABLE}
PAIRS = tuple(product(ANSWERS["colour"], ANSWERS["shape"]))
HELD_OUT = frozenset(PAIRS[8 * i + (i + 3) % 8] for i in range(8))
_SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Scene:
    """One scene: its answers, and its geometry in pixels from the top left of the picture.

    ``asked`` is the (colour, shape) that the presence question names; ``objects`` holds (x, y,
    angle in degrees) for each, all of circumradius ``radius``; ``card`` is (x, y, side, angle);
    ``mark_at`` is the centre of the mark, set even if there is none; ``ground`` is RGB;
    ``pattern`` is (period, phase, contrast in grey levels); ``light`` scales all.
    """

    colour: str
    shape: str
    count: str
    position: str
    letter: str
    texture: str
    detail: str
    asked: tuple[str, str]
    objects: tuple[tuple[float, float, float], ...]
    radius: float
    card: tuple[float, float, float, float]
    mark_at: tuple[float, float]
    ground: tuple[float, ...]
    pattern: tuple[float, float, float]
    light: float

    @property
    def novel(self) -> bool:
        """Whether the picture shows a held-out (colour, shape) pair."""
        return (self.colour, self.shape) in HELD_OUT

    def answer(self, family: str) -> str:
        """The right answer in a family of FAMILIES."""
        if family == "presence":
            return "yes" if self.asked == (self.colour, self.shape) else "no"
        return getattr(self, family)

    def ask(self, family: str, rng: np.random.Generator) -> tuple[str, str]:
        """A (question, answer) of a family, in a wording drawn from ``rng``."""
        article = "an" if self.asked[0] == "orange" else "a"
        wording = str(rng.choice(QUESTIONS[family]))
        return wording.format(f"{article} {' '.join(self.asked)}"), self.answer(family)

    def caption(self) -> str:
        """All attributes in a fixed order, in 12 words."""
        things = self.shape if self.count == "1" else f"{self.shape}s"
        what = f"{self.count} {self.colour} {things}, card {self.letter} at the {self.position}"
        return f"{what}, {self.texture} background, {self.detail.replace('none', 'no')} mark"

    def render(self) -> Image.Image:
        """The picture, 224 x 224 RGB (drawn at twice the size and halved)."""
        picture = drawing.background(self.texture, self.ground, self.pattern)
        for spot in self.objects:
            drawing.add_object(picture, self.shape, self.colour, self.radius, spot)
        drawing.add_card(picture, self.letter, self.card)
        drawing.add_mark(picture, self.detail, self.mark_at)
        return picture.reduce(2).point([min(255, round(v * self.light)) for v in range(256)] * 3)


def _deal(values: tuple[str, ...], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` values in random order, each as often as any other or once more."""
    order = rng.permutation(values).tolist()
    return [order[k % len(order)] for k in rng.permutation(count).tolist()]


def _deal_pairs(count: int, share: float, rng: np.random.Generator) -> list[tuple[str, str]]:
    """``count`` (colour, shape) pairs, a share of them held out, colours and shapes even."""
    # Eight pairs with one difference of (shape - colour) hold every colour and shape once.
    runs, novel = -(-count // 8), int(count * share / 8 + 0.5)
    ordinary = rng.permutation([0, 1, 2, 4, 5, 6, 7]).tolist()
    steps = [3 if run < novel else ordinary[run % 7] for run in range(runs)]
    dealt = [(colour, step) for step in steps for colour in rng.permutation(8)][:count]
    return [PAIRS[8 * c + (c + step) % 8] for c, step in rng.permutation(dealt).tolist()]


def _absent(pair: tuple[str, str], novel: bool, rng: np.random.Generator) -> tuple[str, str]:
    """Another pair, held out or not: colour, shape or both differ about equally often."""
    others = [o for o in PAIRS if o != pair and (o in HELD_OUT) == novel]
    weights = np.array([7.0 if o[0] == pair[0] or o[1] == pair[1] else 1.0 for o in others])
    return others[int(rng.choice(len(others), p=weights / weights.sum()))]


def _scene(answers: dict[str, str], asked: tuple[str, str], rng: np.random.Generator) -> Scene:
    """A scene with these answers; group and card lie anywhere that they fit."""
    radius, side, gap = rng.uniform((19, 54, 6), (23, 60, 9)).tolist()
    half = 0.6 * side  # covers a turned card
    beside = answers["position"] in ("left", "right")
    cells = rng.permutation(6)[: int(answers["count"])]
    grid = np.stack([cells % 2, cells // 2], 1)
    spots = rng.uniform(-2.5, 2.5, (len(cells), 2))
    spots += (2 * radius + 7) * (grid if beside else grid[:, ::-1])
    low, high = spots.min(0) - radius, spots.max(0) + radius
    card = (low + high) / 2 + rng.uniform(-0.3, 0.3) * (high - low)
    across = 0 if beside else 1
    before = answers["position"] in ("left", "top")
    card[across] = low[across] - gap - half if before else high[across] + gap + half
    low, high = np.minimum(low, card - half), np.maximum(high, card + half)
    shift = rng.uniform(6 - low, SIZE - 6 - high)
    spots, card = spots + shift, card + shift
    free = rng.uniform(12, SIZE - 12, (400, 2))
    clear = np.hypot(*(free[:, None] - spots).transpose(2, 0, 1)).min(1) > radius + 11
    free = free[clear & (np.abs(free - card).max(1) > half + 11)]
    return Scene(
        **answers,
        asked=asked,
        objects=tuple((x, y, rng.uniform(-10, 10)) for x, y in spots.tolist()),
        radius=radius,
        card=(float(card[0]), float(card[1]), side, rng.uniform(-6, 6)),
        mark_at=(float(free[0, 0]), float(free[0, 1])),
        ground=tuple((rng.uniform(165, 215) + rng.uniform(-10, 10, 3)).tolist()),
        pattern=(rng.uniform(9, 16), rng.uniform(0, 40), rng.uniform(9, 17)),
        light=rng.uniform(0.85, 1.1),
    )


def sample(count: int, split: Split, seed: int = 0, novel_share: float = 0.25) -> list[Scene]:
    """``count`` scenes; ``novel_share`` of a test split (to the nearest 8) show held-out pairs.

    Raises LayerfuseError for a count below 1, an unknown split, a negative seed or a bad share.
    """
    if split not in _SPLITS:
        raise LayerfuseError(f"split must be 'train' or 'test', not {split!r}")
    if count < 1 or seed < 0 or not 0 <= novel_share <= 1:
        raise LayerfuseError(f"out of range: {count=}, {seed=} or {novel_share=}")
    share = novel_share if split == "test" else 0.0
    deal = np.random.default_rng([seed, _SPLITS[split], 0, 1])
    columns = {name: _deal(ANSWERS[name], count, deal) for name in list(FAMILIES)[2:]}
    scenes = []
    for i, pair in enumerate(_deal_pairs(count, share, deal)):
        rng = np.random.default_rng([seed, _SPLITS[split], 1, i + 1])
        answers = {"colour": pair[0], "shape": pair[1]}
        for name, column in columns.items():
            answers[name] = column[i]
        if answers.pop("presence") == "yes":
            asked = pair
        else:
            asked = _absent(pair, rng.random() < share, rng)
        scenes.append(_scene(answers, asked, rng))
    return scenes


def _choose(
    scenes: list[Scene], families: Sequence[str], questions: int, rng: np.random.Generator
) -> Iterator[list[str]]:
    """The families asked of each scene, in random order; every answer is asked about evenly."""
    due = {(family, answer): 0.0 for family in families for answer in ANSWERS[family]}
    for scene in scenes:
        keys = [(family, scene.answer(family)) for family in families]
        for key in keys:
            due[key] += questions / len(families)
        keys.sort(key=lambda key: 0.5 * rng.random() - due[key])
        for key in keys[:questions]:
            due[key] -= 1
        yield [keys[k][0] for k in rng.permutation(questions)]


def write(
    folder: Path,
    count: int,
    split: Split,
    *,
    seed: int = 0,
    questions: int = 6,
    families: Sequence[str] | None = None,
    novel_share: float = 0.25,
) -> Path:
    """Write scenes with ``questions`` exchanges each as PNG and LLaVA JSON; returns ``folder``.

    Each question is of another of ``families`` (default: all eight). The folder appears complete
    or not at all; one that holds the same scenes already is left as it is.
    Raises LayerfuseError for bad arguments and for a folder that holds anything else.
    """
    asked = list(families or FAMILIES)
    unknown = [family for family in asked if family not in FAMILIES]
    if unknown:
        raise LayerfuseError(f"unknown question families {unknown}; valid: {list(FAMILIES)}")
    if not 1 <= questions <= len(set(asked)) == len(asked):
        raise LayerfuseError(f"questions must lie between 1 and {len(set(asked))}, not {questions}")
    share = novel_share if split == "test" else 0.0
    settings: dict[str, Any] = {
        "version": VERSION,
        "count": count,
        "split": split,
        "seed": seed,
        "questions": questions,
        "novel_share": share,
        "families": asked,
    }
    if folder.exists() and any(folder.iterdir()):
        settings_file = folder / "scenes.json"
        written_settings: dict[str, Any] = {}
        if settings_file.is_file():
            written_settings = json.loads(settings_file.read_text("utf-8"))
        different = {}
        for name, value in settings.items():
            if written_settings.get(name) != value:
                different[name] = written_settings.get(name)
        if different:
            raise LayerfuseError(f"{folder} was not written with {settings}: it has {different}")
        return folder
    # Renamed when it is complete, under a name of its own: several processes may write at once.
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _fill(partial, sample(count, split, seed, novel_share), settings)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _fill(folder: Path, scenes: list[Scene], settings: dict[str, Any]) -> None:
    """Write pictures, conversations, captions and settings into a new ``folder``."""
    (folder / "images").mkdir(parents=True)
    split = settings["split"]
    rng = np.random.default_rng([settings["seed"], _SPLITS[split], 2, 1])
    chosen = _choose(scenes, settings["families"], settings["questions"], rng)
    talks, captions = [], []
    for i, (scene, families) in enumerate(zip(scenes, chosen, strict=True), start=1):
        head = {"id": f"{split}-{i:06d}", "image": f"images/{i:06d}.png"}
        scene.render().save(folder / head["image"], compress_level=1)
        said = [text for family in families for text in scene.ask(family, rng)]
        said[0] = f"<image>\n{said[0]}"
        tags = {"families": families, "categories": [FAMILIES[f] for f in families]}
        talks.append({**head, "conversations": _turns(said), **tags, "novel": scene.novel})
        captions.append({**head, "conversations": _turns(["<image>", scene.caption()])})
    files = {"conversations": talks, "captions": captions, "scenes": settings}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _turns(said: list[str]) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
