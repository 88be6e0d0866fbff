"""The synthetic scenes: balance, held-out pairs, geometry, questions and determinism."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from layerfuse.data import drawing
from layerfuse.data.drawing import SIZE
from layerfuse.data.scene_files import choose_families
from layerfuse.data.scenes import FAMILIES, HELD_OUT, PAIRS, Pair, Scene, Split, sample


def answers_of(family: str) -> tuple[str, ...]:
    """All answers that a family of questions may have."""
    return FAMILIES[family].answers


def count_answers(scenes: Iterable[Scene], family: str) -> Counter[str]:
    """How many scenes have each answer."""
    return Counter(scene.answer(family) for scene in scenes)


# Balance: a model that guesses is right as seldom as chance


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("count", [1, 7, 48, 333])
def test_every_answer_is_dealt_out_evenly(split: Split, count: int) -> None:
    scenes = sample(count, split, seed=5)

    for family in FAMILIES:
        answers = answers_of(family)
        counts = count_answers(scenes, family)
        assert set(counts) <= set(answers)
        rarest = min(counts.values())
        if len(counts) < len(answers):
            # Some answers do not occur at all.
            rarest = 0
        assert max(counts.values()) - rarest <= 1, family


@pytest.mark.parametrize(("split", "count"), [("train", 400), ("test", 150)])
@pytest.mark.parametrize("questions", [1, 3, 6, 8])
def test_asked_answers_stay_balanced(split: Split, count: int, questions: int) -> None:
    # Every scene is asked about some of its attributes: balanced scenes alone are not enough.
    scenes = sample(count, split, seed=2)
    rng = np.random.default_rng(0)

    families_by_scene = list(choose_families(scenes, tuple(FAMILIES), questions, rng))

    for families in families_by_scene:
        assert len(set(families)) == questions
    for family in FAMILIES:
        asked_scenes = []
        for scene, families in zip(scenes, families_by_scene, strict=True):
            if family in families:
                asked_scenes.append(scene)
        total = len(asked_scenes)
        num_answers = len(answers_of(family))
        assert total == pytest.approx(count * questions / 8, abs=num_answers + 2)
        counts = count_answers(asked_scenes, family)
        excess = max(counts.values()) - total / num_answers
        # Within two items, or two percentage points where that is more.
        assert excess <= max(2, 0.02 * total), family


# Pairs of a colour and a shape that no train split shows or names


def shown_pair(scene: Scene) -> Pair:
    """The colour and the shape of a scene's objects."""
    return scene.colour, scene.shape


def with_presence(scenes: Iterable[Scene], answer: str) -> list[Scene]:
    """The scenes whose question for a pair has this answer."""
    return [scene for scene in scenes if scene.answer("presence") == answer]


def test_every_colour_and_every_shape_is_held_out_once() -> None:
    # So that training shows all of them in other pairs.
    colours = set()
    shapes = set()
    for colour, shape in HELD_OUT:
        colours.add(colour)
        shapes.add(shape)
    assert len(HELD_OUT) == 8
    assert len(colours) == 8
    assert len(shapes) == 8


@pytest.mark.parametrize("split", ["train", "validation"])
def test_only_tests_show_held_out_pairs(split: Split) -> None:
    """What is chosen by validation pictures is chosen without them too."""
    scenes = sample(1000, split, novel_share=0.9)

    shown_pairs = set()
    for scene in scenes:
        assert not scene.novel
        shown_pairs.add(shown_pair(scene))
        # Nor do questions and captions name them.
        assert scene.asked not in HELD_OUT
        for colour, shape in HELD_OUT:
            assert f"{colour} {shape}" not in scene.caption()
    assert shown_pairs == set(PAIRS) - HELD_OUT


@pytest.mark.parametrize(("share", "novel"), [(0.0, 0), (0.25, 80), (0.5, 160), (1.0, 320)])
def test_test_splits_hold_their_share_of_novel_pairs(share: float, novel: int) -> None:
    scenes = sample(320, "test", novel_share=share)

    counts: Counter[Pair] = Counter()
    for scene in scenes:
        if scene.novel:
            counts[shown_pair(scene)] += 1
    assert counts.total() == novel
    # Each of the eight pairs the same number of times
    assert set(counts.values()) <= {novel // 8}
    # Half of the scenes are asked for a pair that they do not show: as novel as what is shown, so
    # that novelty says nothing about the answer.
    num_novel_asked = 0
    for scene in with_presence(scenes, "no"):
        if scene.asked in HELD_OUT:
            num_novel_asked += 1
    assert num_novel_asked == pytest.approx(share * 160, abs=25)


def test_wrong_presence_questions_change_colour_shape_or_both() -> None:
    # If all changed both, the colour alone would answer the question.
    absent = with_presence(sample(1200, "train"), "no")

    kinds: Counter[str] = Counter()
    for scene in absent:
        asked_colour, asked_shape = scene.asked
        if asked_colour == scene.colour and asked_shape == scene.shape:
            kinds["nothing"] += 1
        elif asked_colour == scene.colour:
            kinds["shape"] += 1
        elif asked_shape == scene.shape:
            kinds["colour"] += 1
        else:
            kinds["both"] += 1

    assert set(kinds) == {"colour", "shape", "both"}
    for number in kinds.values():
        assert 150 < number < 250


# Geometry: nothing overlaps, nothing is cut off, and the card lies where the answer says


@dataclass
class Box:
    """A part of a picture, in pixels from its top left."""

    left: float
    top: float
    right: float
    bottom: float


def box_of_objects(scene: Scene) -> Box:
    """The box around the circles of all objects."""
    xs = [pose.x for pose in scene.objects]
    ys = [pose.y for pose in scene.objects]
    return Box(
        left=min(xs) - scene.radius,
        top=min(ys) - scene.radius,
        right=max(xs) + scene.radius,
        bottom=max(ys) + scene.radius,
    )


def half_of_card(scene: Scene) -> float:
    """Half of the side of the box around the turned card, in pixels."""
    angle = math.radians(abs(scene.card.angle))
    return scene.card.side / 2 * (math.cos(angle) + math.sin(angle))


def box_of_card(scene: Scene) -> Box:
    """The box around the turned card."""
    half = half_of_card(scene)
    return Box(
        left=scene.card.x - half,
        top=scene.card.y - half,
        right=scene.card.x + half,
        bottom=scene.card.y + half,
    )


@pytest.fixture(scope="module", params=["train", "validation", "test"])
def many_scenes(request: pytest.FixtureRequest) -> list[Scene]:
    """300 scenes of each split."""
    return sample(300, request.param, seed=1)


def test_objects_lie_apart(many_scenes: list[Scene]) -> None:
    for scene in many_scenes:
        centres = [(pose.x, pose.y) for pose in scene.objects]
        assert len(centres) == int(scene.count)
        for place, centre in enumerate(centres):
            for other_centre in centres[:place]:
                # Two radii, and two pixels between them
                assert math.dist(centre, other_centre) > 2 * scene.radius + 2


def test_objects_and_card_lie_inside(many_scenes: list[Scene]) -> None:
    for scene in many_scenes:
        for box in (box_of_objects(scene), box_of_card(scene)):
            assert min(box.left, box.top) >= 4
            assert max(box.right, box.bottom) <= SIZE - 4


def test_the_mark_lies_on_the_bare_background(many_scenes: list[Scene]) -> None:
    for scene in many_scenes:
        x, y = scene.mark_at
        for pose in scene.objects:
            distance = math.dist(scene.mark_at, (pose.x, pose.y))
            assert distance > scene.radius + 6
        distance_to_card = max(abs(x - scene.card.x), abs(y - scene.card.y))
        assert distance_to_card > half_of_card(scene) + 6
        assert min(x, y) > 6
        assert max(x, y) < SIZE - 6


def test_the_card_lies_on_the_side_that_is_the_answer(many_scenes: list[Scene]) -> None:
    for scene in many_scenes:
        group = box_of_objects(scene)
        card = box_of_card(scene)
        # Pixels between the two, negative where they overlap in this direction
        gaps = {
            "left": group.left - card.right,
            "right": card.left - group.right,
            "top": group.top - card.bottom,
            "bottom": card.top - group.bottom,
        }
        for side, gap in gaps.items():
            # On one side alone: in a corner two answers would be right.
            is_beside = gap > 0
            assert is_beside == (side == scene.position)
        if scene.position in ("top", "bottom"):
            assert group.left < scene.card.x < group.right
        else:
            assert group.top < scene.card.y < group.bottom


def test_the_card_lies_at_many_places() -> None:
    # At one place for each side, the position could be told without the objects.
    columns = set()
    rows = set()
    for scene in sample(600, "train"):
        if scene.position == "left":
            # In cells of 40 pixels
            columns.add(round(scene.card.x / 40))
            rows.add(round(scene.card.y / 40))

    assert len(columns) >= 3
    assert len(rows) >= 4


def test_outlines_fit_the_circle_the_geometry_reserves() -> None:
    for shape in answers_of("shape"):
        # In units of the circle's radius
        longest = np.abs(drawing.outline(shape)).max()
        assert 0.9 < longest <= 1.001


# Pictures


def test_scenes_depend_on_split_and_seed_alone() -> None:
    scenes = sample(30, "train", 4)

    assert sample(30, "train", 4) == scenes
    assert sample(30, "train", 5) != scenes
    assert sample(30, "test", 4, novel_share=0) != scenes
    assert sample(30, "validation", 4) != scenes
    # Each scene draws its own numbers.
    lights = {scene.light for scene in sample(50, "train")}
    assert len(lights) == 50


def test_no_two_splits_share_a_picture() -> None:
    scenes = [
        *sample(60, "train"),
        *sample(60, "validation"),
        *sample(60, "test"),
        *sample(60, "train", 1),
    ]

    distinct = set()
    for scene in scenes:
        picture = scene.render()
        assert picture.size == (SIZE, SIZE)
        assert picture.mode == "RGB"
        distinct.add(picture.tobytes())

    assert len(distinct) == len(scenes)


@pytest.mark.parametrize("attribute", ["detail", "letter", "texture", "colour", "shape"])
def test_every_attribute_shows_in_the_picture(attribute: str) -> None:
    # Two values that look the same would make a question that nobody can answer.
    scene = sample(1, "train")[0]
    values = answers_of(attribute)

    pictures = set()
    for value in values:
        changed = replace(scene, **{attribute: value})
        pictures.add(changed.render().tobytes())

    assert len(pictures) == len(values)


# Questions


def test_questions_belong_to_one_family_and_answers_to_the_scene() -> None:
    rng = np.random.default_rng(0)
    family_by_question: dict[str, str] = {}
    for scene in sample(200, "test"):
        for family in FAMILIES:
            question, answer = scene.ask(family, rng)

            # The same words for two families would have two right answers.
            assert family_by_question.setdefault(question, family) == family
            assert answer in answers_of(family)
            assert answer == scene.answer(family)
            assert question.endswith("?")
            assert "{" not in question
    assert any(question.startswith("Is there an orange ") for question in family_by_question)


def test_presence_questions_name_the_pair_that_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    for scene in sample(200, "test"):
        question, answer = scene.ask("presence", rng)

        asked = " ".join(scene.asked)
        assert question.endswith(f" {asked}?")
        shown = f"{scene.colour} {scene.shape}"
        assert (answer == "yes") == (asked == shown)


def test_captions_say_all_that_is_asked() -> None:
    for scene in sample(200, "test"):
        words = scene.caption().replace(",", "").split()

        assert len(words) <= 16
        for family in ("colour", "count", "position", "letter", "texture"):
            assert scene.answer(family) in words
        # Several objects are named in the plural.
        noun = words[2]
        assert scene.shape in (noun, noun.removesuffix("s"))
