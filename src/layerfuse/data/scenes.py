"""Synthetic question-and-answer scenes in the LLaVA format.

A scene is a 224 x 224 picture with a group of equal objects, a card with a letter beside it, a
patterned background and a tiny mark. Eight families of questions, from local colour to small
print, make different encoder depths useful. Answers are dealt out evenly over a split. Eight of the
64 (colour, shape) pairs are held out: only test splits show or name them. Answers on presence,
colour and shape tell something about each other: score exchanges one at a time.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from PIL import Image

from layerfuse.data import drawing, scene_layout
from layerfuse.data.drawing import SIZE, Card, Pattern, Pose
from layerfuse.errors import LayerfuseError

Split = Literal["train", "validation", "test"]
Wording = Literal["question", "short"]
"""`short` names the family alone, such as `colour:`"""
Pair = tuple[str, str]
"""a colour and a shape"""

VERSION = 2
"""Grows with every change of the pictures or questions that a seed gives."""


@dataclass(frozen=True)
class QuestionFamily:
    """Questions about one attribute of a scene."""

    category: str
    """the category of LLaVA-like benchmarks that the family stands for"""
    answers: tuple[str, ...]
    """all that may be right"""
    wordings: tuple[str, ...]
    """equivalent questions; {} stands for the object that is asked about"""
    short: str
    """the same as one word or two"""


FAMILIES = {
    "colour": QuestionFamily(
        category="General",
        answers=("red", "orange", "yellow", "green", "blue", "purple", "pink", "black"),
        wordings=("What colour?",),
        short="colour:",
    ),
    "shape": QuestionFamily(
        category="General",
        answers=("circle", "square", "triangle", "star", "heart", "diamond", "ring", "moon"),
        wordings=("What shape?",),
        short="shape:",
    ),
    "count": QuestionFamily(
        category="Vision-centric",
        answers=("1", "2", "3", "4", "5", "6"),
        wordings=("How many?", "How many objects?"),
        short="count:",
    ),
    "position": QuestionFamily(
        category="Vision-centric",
        answers=("left", "right", "top", "bottom"),
        wordings=("Where is the card?", "On which side?"),
        short="position:",
    ),
    "letter": QuestionFamily(
        category="Chart&OCR",
        answers=("A", "E", "L", "M", "O", "S", "T", "X"),
        wordings=("Which letter?", "What does the card say?"),
        short="letter:",
    ),
    "texture": QuestionFamily(
        category="Fine-grained",
        answers=("plain", "horizontal", "vertical", "diagonal", "dots", "checks"),
        wordings=("What pattern?",),
        short="texture:",
    ),
    "detail": QuestionFamily(
        category="Fine-grained",
        answers=("dot", "cross", "line", "none"),
        wordings=("Which tiny mark?", "What is the tiny mark?"),
        short="detail:",
    ),
    "presence": QuestionFamily(
        category="Hallucination",
        answers=("yes", "no"),
        wordings=("Is there {}?", "Do you see {}?"),
        short="presence of {}:",
    ),
}

PAIRS: tuple[Pair, ...] = tuple(product(FAMILIES["colour"].answers, FAMILIES["shape"].answers))
"""all 8 x 8 pairs, the shapes of one colour after each other"""
_HELD_OUT_STEP = 3


def _pair(colour: int, step: int) -> Pair:
    """The pair of the colour with that index and the shape `step` indices further, in a circle."""
    return PAIRS[8 * colour + (colour + step) % 8]


# One step for all eight, so that every colour and every shape is held out once.
HELD_OUT = frozenset(_pair(colour, _HELD_OUT_STEP) for colour in range(8))

# A number of its own for each, so that its pictures are drawn independently of the others'.
SPLITS = {"train": 0, "test": 1, "validation": 2}
PURPOSES = {"answers": 0, "geometry": 1, "questions": 2}


def generator(seed: int, split: Split, purpose: str, number: int = 1) -> np.random.Generator:
    """A random generator that draws independently of all others.

    Args:
        seed: at least 0.
        split: a key of `SPLITS`.
        purpose: a key of `PURPOSES`.
        number: of the scene, from 1: numpy takes lists that differ in zeros at the end for one.
    """
    return np.random.default_rng([seed, SPLITS[split], PURPOSES[purpose], number])


@dataclass(frozen=True)
class Scene:
    """One scene: its answers, and its geometry in pixels from the top left of the picture."""

    colour: str
    shape: str
    count: str
    position: str
    letter: str
    texture: str
    detail: str
    asked: Pair
    """the colour and shape that the presence question names"""
    objects: tuple[Pose, ...]
    radius: float
    """of the circle around each object"""
    card: Card
    mark_at: tuple[float, float]
    """x and y of the centre of the mark, set even if there is none"""
    ground: tuple[float, ...]
    """red, green and blue of the background, 0..255"""
    pattern: Pattern
    light: float
    """factor of all colours"""

    @property
    def novel(self) -> bool:
        """Whether the picture shows a held-out (colour, shape) pair."""
        return (self.colour, self.shape) in HELD_OUT

    def answer(self, family: str) -> str:
        """The right answer in a family of `FAMILIES`."""
        if family != "presence":
            return getattr(self, family)
        if self.asked == (self.colour, self.shape):
            return "yes"
        return "no"

    def ask(
        self, family: str, rng: np.random.Generator, wording: Wording = "question"
    ) -> tuple[str, str]:
        """A question of a family and its right answer.

        Args:
            family: a key of `FAMILIES`.
            rng: draws one of the family's questions.
            wording: whether it is a question or as short as can be.
        """
        # Drawn for short ones too, so that both wordings ask the same of the same pictures.
        question = str(rng.choice(FAMILIES[family].wordings))
        if wording == "short":
            question = FAMILIES[family].short
        colour, shape = self.asked
        article = "a"
        if colour == "orange":
            article = "an"
        # Only the wordings of presence have a place for the object.
        return question.format(f"{article} {colour} {shape}"), self.answer(family)

    def caption(self) -> str:
        """All attributes in a fixed order, in 12 words."""
        objects = self.shape
        if self.count != "1":
            objects += "s"
        mark = self.detail
        if mark == "none":
            mark = "no"
        return (
            f"{self.count} {self.colour} {objects}, card {self.letter} at the {self.position}, "
            f"{self.texture} background, {mark} mark"
        )

    def render(self) -> Image.Image:
        """The picture, 224 x 224 RGB (drawn at twice the size and halved)."""
        picture = drawing.background(self.texture, self.ground, self.pattern)
        for pose in self.objects:
            drawing.add_object(
                picture,
                shape=self.shape,
                colour=self.colour,
                radius=self.radius,
                pose=pose,
            )
        drawing.add_card(picture, self.letter, self.card)
        drawing.add_mark(picture, self.detail, self.mark_at)
        levels = [min(255, round(level * self.light)) for level in range(256)]
        # One table for each of red, green and blue.
        return picture.reduce(drawing.SCALE).point(levels * 3)


def _deal(values: tuple[str, ...], count: int, rng: np.random.Generator) -> list[str]:
    """`count` values in random order, each as often as any other or once more."""
    # A random order of the values as well: which of them come once more is random too.
    order = rng.permutation(values).tolist()
    return [order[place % len(order)] for place in rng.permutation(count).tolist()]


def _deal_pairs(count: int, share: float, rng: np.random.Generator) -> list[Pair]:
    """`count` pairs in random order, a share of them held out, colours and shapes even."""
    # Eight pairs of one step hold every colour and every shape once: pairs are dealt in such
    # rounds, the last of which may be cut.
    num_rounds = -(-count // 8)
    # Rounded to whole rounds.
    num_novel = int(count * share / 8 + 0.5)
    ordinary = rng.permutation([0, 1, 2, 4, 5, 6, 7]).tolist()
    dealt = []
    for round_index in range(num_rounds):
        step = ordinary[round_index % 7]
        # In the first rounds: the order of the pairs is shuffled below.
        if round_index < num_novel:
            step = _HELD_OUT_STEP
        for colour in rng.permutation(8):
            dealt.append((colour, step))
    pairs = []
    for colour, step in rng.permutation(dealt[:count]).tolist():
        pairs.append(_pair(colour, step))
    return pairs


def _absent(shown: Pair, novel: bool, rng: np.random.Generator) -> Pair:
    """A pair that the picture does not show.

    Args:
        shown: what the picture shows.
        novel: whether to take a held-out pair.
        rng: draws it.

    Returns:
        A pair whose colour, shape or both differ, each about equally often.
    """
    others = []
    weights = []
    for pair in PAIRS:
        if pair == shown or (pair in HELD_OUT) != novel:
            continue
        others.append(pair)
        # 7 pairs share the colour, 7 the shape, 49 neither.
        if pair[0] == shown[0] or pair[1] == shown[1]:
            weights.append(7.0)
        else:
            weights.append(1.0)
    probabilities = np.array(weights) / np.sum(weights)
    return others[int(rng.choice(len(others), p=probabilities))]


def _scene(answers: dict[str, str], asked: Pair, rng: np.random.Generator) -> Scene:
    """A scene with these answers; group and card lie anywhere that they fit.

    Args:
        answers: by family, all but presence.
        asked: what the presence question names.
        rng: draws the geometry. The order of its draws decides which scene a seed gives.
    """
    radius, side, gap = rng.uniform((19, 54, 6), (23, 60, 9)).tolist()
    # Half of the card's box, with room for its turning.
    half = 0.6 * side
    position = answers["position"]
    centres = scene_layout.place_group(int(answers["count"]), position, radius, rng)
    card = scene_layout.place_card(centres, position, radius=radius, half=half, gap=gap, rng=rng)
    # Group and card move together to anywhere at least 6 pixels within the picture.
    low = np.minimum(centres.min(0) - radius, card - half)
    high = np.maximum(centres.max(0) + radius, card + half)
    shift = rng.uniform(6 - low, SIZE - 6 - high)
    centres = centres + shift
    card = card + shift
    mark = scene_layout.place_mark(centres, card, radius=radius, half=half, rng=rng)
    objects = [Pose(x, y, rng.uniform(-10, 10)) for x, y in centres.tolist()]
    return Scene(
        **answers,
        asked=asked,
        objects=tuple(objects),
        radius=radius,
        card=Card(float(card[0]), float(card[1]), side, rng.uniform(-6, 6)),
        mark_at=(float(mark[0]), float(mark[1])),
        # A common brightness, and a small tint of each colour.
        ground=tuple((rng.uniform(165, 215) + rng.uniform(-10, 10, 3)).tolist()),
        pattern=Pattern(
            period=rng.uniform(9, 16),
            phase=rng.uniform(0, 40),
            contrast=rng.uniform(9, 17),
        ),
        light=rng.uniform(0.85, 1.1),
    )


def sample(count: int, split: Split, seed: int = 0, novel_share: float = 0.25) -> list[Scene]:
    """Make scenes.

    Args:
        count: number of scenes.
        split: splits never share a picture.
        seed: the same seed gives the same scenes.
        novel_share: share of the scenes of a test split (to the nearest 8) that show held-out
            pairs, 0..1; no matter in the other splits.

    Raises:
        LayerfuseError: a count below 1, an unknown split, a negative seed or a bad share.
    """
    if split not in SPLITS:
        raise LayerfuseError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if count < 1 or seed < 0 or not 0 <= novel_share <= 1:
        raise LayerfuseError(f"out of range: {count=}, {seed=} or {novel_share=}")
    share = 0.0
    if split == "test":
        share = novel_share
    dealing = generator(seed, split, "answers")
    answers_of = {}
    for name, family in FAMILIES.items():
        # Dealt as pairs below.
        if name not in ("colour", "shape"):
            answers_of[name] = _deal(family.answers, count, dealing)
    scenes = []
    for index, shown in enumerate(_deal_pairs(count, share, dealing)):
        rng = generator(seed, split, "geometry", index + 1)
        answers = {"colour": shown[0], "shape": shown[1]}
        for name, dealt in answers_of.items():
            answers[name] = dealt[index]
        asked = shown
        # Wrong questions name held-out pairs as often as pictures show them: that a pair is new
        # must not tell the answer.
        if answers.pop("presence") == "no":
            asked = _absent(shown, rng.random() < share, rng)
        scenes.append(_scene(answers, asked, rng))
    return scenes
