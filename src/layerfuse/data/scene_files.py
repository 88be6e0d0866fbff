"""Files of generated scenes: which questions are asked of each, as PNG and LLaVA JSON."""

import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerfuse.data.scenes import FAMILIES, VERSION, Scene, Split, Wording, generator, sample
from layerfuse.errors import LayerfuseError


def asked_families(families: Sequence[str] | None, questions: int) -> list[str]:
    """The families of questions that scenes are asked about.

    Args:
        families: some of `FAMILIES`; all eight if there are none.
        questions: for each scene, at most one of each family.

    Raises:
        LayerfuseError: a family is unknown or named twice, or there are too few of them.
    """
    asked = list(families or FAMILIES)
    unknown = [family for family in asked if family not in FAMILIES]
    if unknown:
        raise LayerfuseError(f"unknown question families {unknown}; valid: {list(FAMILIES)}")
    if not 1 <= questions <= len(set(asked)) == len(asked):
        raise LayerfuseError(f"questions must lie between 1 and {len(set(asked))}, not {questions}")
    return asked


def choose_families(
    scenes: list[Scene], families: Sequence[str], questions: int, rng: np.random.Generator
) -> Iterator[list[str]]:
    """Choose what is asked of each scene, so that every answer is asked for evenly.

    Args:
        scenes: of a split.
        families: distinct keys of `FAMILIES`.
        questions: families to choose for each scene.
        rng: draws the choice and the order when a scene is reached.

    Yields:
        The families of each scene, in random order.
    """
    # How many questions with this answer there should be by now, less those that there are.
    due: dict[tuple[str, str], float] = {}
    for family in families:
        for answer in FAMILIES[family].answers:
            due[family, answer] = 0.0
    for scene in scenes:
        candidates = []
        ranks = {}
        for family in families:
            key = (family, scene.answer(family))
            due[key] += questions / len(families)
            candidates.append(key)
        for key in candidates:
            # What is most due comes first; chance decides where it is close.
            ranks[key] = 0.5 * rng.random() - due[key]
        candidates.sort(key=ranks.__getitem__)
        for key in candidates[:questions]:
            due[key] -= 1
        yield [candidates[place][0] for place in rng.permutation(questions)]


def write(
    folder: Path,
    count: int,
    split: Split,
    *,
    seed: int = 0,
    questions: int = 6,
    families: Sequence[str] | None = None,
    novel_share: float = 0.25,
    wording: Wording = "question",
) -> Path:
    """Write scenes as PNG and LLaVA JSON.

    The folder appears complete or not at all; one that holds the same scenes already is left as it
    is.

    Args:
        folder: where to.
        count: as for `sample`.
        split: as for `sample`.
        seed: as for `sample`.
        questions: exchanges of each scene, each of another family.
        families: some of `FAMILIES` to ask about; all eight if there are none.
        novel_share: as for `sample`.
        wording: of the questions.

    Returns:
        `folder`.

    Raises:
        LayerfuseError: bad arguments, a folder that holds anything else, or one that cannot be
            written.
    """
    asked = asked_families(families, questions)
    share = 0.0
    if split == "test":
        share = novel_share
    # All that the pictures and questions depend on, to know such a folder again.
    settings: dict[str, Any] = {
        "version": VERSION,
        "count": count,
        "split": split,
        "seed": seed,
        "questions": questions,
        "novel_share": share,
        "families": asked,
        "wording": wording,
    }
    if _holds_files(folder):
        _check_settings(folder, settings)
        return folder
    # Raises for bad arguments before anything is written.
    scenes = sample(count, split, seed, novel_share)
    # Renamed when it is complete, under a name of its own: several processes may write at once.
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _fill(unfinished, scenes, settings)
        unfinished.rename(folder)
    except OSError as error:
        # A folder that holds files cannot be replaced: another process was done first.
        if not _holds_files(folder):
            raise LayerfuseError(f"cannot write the scenes {folder}: {error}") from error
        _check_settings(folder, settings)
    finally:
        # Nothing is there after the rename.
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _holds_files(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise LayerfuseError if a folder does not hold the scenes of these settings."""
    settings_file = folder / "scenes.json"
    written_settings: dict[str, Any] = {}
    if settings_file.is_file():
        try:
            written_settings = json.loads(settings_file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise LayerfuseError(f"cannot read {settings_file}: {error}") from error
        # Folders from before there was a choice hold questions.
        written_settings.setdefault("wording", "question")
    # A folder without the file, such as one of the user's, differs in everything.
    different = {}
    for name, value in settings.items():
        if written_settings.get(name) != value:
            different[name] = written_settings.get(name)
    if different:
        raise LayerfuseError(f"{folder} was not written with {settings}: it has {different}")


def _fill(folder: Path, scenes: list[Scene], settings: dict[str, Any]) -> None:
    """Write pictures, conversations, captions and settings.

    Args:
        folder: a new one.
        scenes: in their order.
        settings: what `write` was called with.
    """
    (folder / "images").mkdir(parents=True)
    split = settings["split"]
    rng = generator(settings["seed"], split, "questions")
    chosen = choose_families(scenes, settings["families"], settings["questions"], rng)
    conversations = []
    captions = []
    for number, (scene, families) in enumerate(zip(scenes, chosen, strict=True), start=1):
        sample_id = f"{split}-{number:06d}"
        image = f"images/{number:06d}.png"
        # PNG is lossless: the level changes the file's size and the time alone.
        scene.render().save(folder / image, compress_level=1)
        turns = []
        for family in families:
            question, answer = scene.ask(family, rng, settings["wording"])
            # The first question shows the picture.
            if not turns:
                question = f"<image>\n{question}"
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": answer})
        conversation = {
            "id": sample_id,
            "image": image,
            "conversations": turns,
            "families": families,
            "categories": [FAMILIES[family].category for family in families],
            "novel": scene.novel,
        }
        conversations.append(conversation)
        caption = {
            "id": sample_id,
            "image": image,
            "conversations": [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": scene.caption()},
            ],
        }
        captions.append(caption)
    _write_json(folder / "conversations.json", conversations)
    _write_json(folder / "captions.json", captions)
    _write_json(folder / "scenes.json", settings)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
