"""MME: two questions with yes or no about each picture, in fourteen tasks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from layerfuse.data import text_files
from layerfuse.errors import LayerfuseError, short
from layerfuse.evaluate.answer_parsing import leading_yes_no
from layerfuse.evaluate.benchmarks.choices import groups_right
from layerfuse.evaluate.benchmarks.interface import (
    Benchmark,
    Column,
    Item,
    Judged,
    JudgedItem,
    benchmark,
    by_group,
    share,
)
from layerfuse.evaluate.benchmarks.official_files import checked_items
from layerfuse.evaluate.benchmarks.official_pictures import picture_file

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)

_RELEASE_FOLDERS = (
    "",
    "MME_Benchmark_release_version",
    "MME_Benchmark_release_version/MME_Benchmark",
    "MME_Benchmark",
)
"""where the folders of the tasks are, as the archives of different years unpack"""
_PICTURE_SUFFIXES = (".jpg", ".png", ".jpeg")
_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Please answer yes or no.",
)
"""what the benchmark and LLaVA's files write behind a question, the last one first"""


@benchmark
class Mme(Benchmark):
    """MME, as its evaluation tool scores it: accuracy and accuracy+ of each task, in sums.

    LLaVA's file of questions, `llava_mme.jsonl` of its `eval.zip` (docs/Evaluation.md of
    haotian-liu/LLaVA), names the pictures of the release, and `readme.txt` of the release its
    terms of use.
    """

    name: ClassVar[str] = "mme"
    title: ClassVar[str] = "MME"
    licence: ClassVar[str] = "academic research only"
    expected: ClassVar[tuple[str, ...]] = (
        "<task>/images/*.jpg and <task>/questions_answers_YN/*.txt, for each of fourteen tasks",
        "or <task>/*.jpg and <task>/*.txt beside each other",
    )
    headline: ClassVar[str] = "perception"
    published_questions: ClassVar[tuple[int, ...]] = (2374,)

    def load(self, folder: Path) -> list[Item]:
        """Read the questions.

        Args:
            folder: with the tasks' folders, or with MME_Benchmark_release_version.

        Returns:
            Two questions for each picture. `together` is the task and the picture, such as
            `count/0001.jpg`; the words "Please answer yes or no." are left out of a question.

        Raises:
            LayerfuseError: a task is missing, or a picture has not two questions.
        """
        root = _find_tasks(folder)
        items: list[Item] = []
        for task in PERCEPTION + COGNITION:
            items += _read_task(root, task)
        return checked_items(root, items)

    def id_in(self, line: Mapping[str, Any], items: Sequence[Item]) -> str:
        """Say which question a line of a file of answers is about, also one of LLaVA's files.

        Args:
            line: of JSON lines; one of LLaVA has a `question_id` that both questions of a picture
                have, and the `prompt` with the question.
            items: all questions.

        Returns:
            The question's id, or what stands in its place.

        Raises:
            LayerfuseError: the line names no question.
        """
        named = super().id_in(line, items)
        if "id" in line or "prompt" not in line:
            return named
        return find_by_llava_id(items, named, str(line["prompt"])).id

    def judge(self, item: Item, answer: str) -> Judged:
        """Score one answer.

        Args:
            item: the question.
            answer: yes or no is looked for in its first four characters only.

        Returns:
            What was understood; what is neither yes nor no is wrong.
        """
        word = leading_yes_no(answer)
        # It is wrong, as in the official tool.
        if word == "other":
            return Judged(None, 0.0)
        return Judged(word, float(word == item.answers[0]))

    def columns(self, answered: Sequence[JudgedItem]) -> list[Column]:
        """Give the scores.

        Args:
            answered: every question once.

        Returns:
            Both sums, and each task's accuracy plus accuracy+, of 200.
        """
        # The sums are over tasks, which weigh the same whatever their sizes.
        tasks = by_group(answered)
        scores = {task: _task_score(task, tasks.get(task, [])) for task in PERCEPTION + COGNITION}
        perception = _sum("perception", [scores[task] for task in PERCEPTION])
        cognition = _sum("cognition", [scores[task] for task in COGNITION])
        return [perception, cognition, *scores.values()]


def bare_question(text: str) -> str:
    """A question without the words that tell how to answer it.

    Args:
        text: as the benchmark's files or those of LLaVA have it.

    Returns:
        What is asked, with single spaces.
    """
    question = " ".join(text.split())
    # At the end alone: a question may quote such words.
    for instruction in _INSTRUCTIONS:
        question = question.removesuffix(instruction).rstrip()
    return question


def find_by_llava_id(items: Iterable[Item], question_id: str, text: str) -> Item:
    """The question that a line of LLaVA's files is about, such as of `llava_mme.jsonl`.

    Args:
        items: all questions.
        question_id: such as `count/0001.jpg` or `artwork/images/339.jpg`, which two lines have.
        text: the question, with or without instructions.

    Returns:
        The question.

    Raises:
        LayerfuseError: the picture has no such question.
    """
    # Those of tasks with a folder for pictures have its name in them.
    picture = _without_suffix(question_id.replace("/images/", "/"))
    # The id alone is not enough: both questions of a picture have it.
    of_picture = [item for item in items if _without_suffix(item.together) == picture]
    if not of_picture:
        raise LayerfuseError(
            f"MME has no picture {short(question_id)}; an id such as count/0001.jpg is expected"
        )
    # Without instructions, as those of LLaVA's files differ from MME's own.
    wanted = bare_question(text)
    for item in of_picture:
        if item.question == wanted:
            return item
    asked = " and ".join(repr(item.question) for item in of_picture)
    raise LayerfuseError(f"MME asks {asked} about {question_id}, and not {short(wanted)}")


def _without_suffix(picture: str) -> str:
    """The name of a picture without `.jpg` or `.png`, which is not known where it is missing."""
    return picture.rpartition(".")[0] or picture


def _find_tasks(folder: Path) -> Path:
    """The folder with the folders of all tasks.

    Raises:
        LayerfuseError: some are missing.
    """
    wanted = PERCEPTION + COGNITION
    # So that the error is about the folder that comes closest.
    most_found: list[str] = []
    for name in _RELEASE_FOLDERS:
        root = folder / name
        found = [task for task in wanted if (root / task).is_dir()]
        if len(found) == len(wanted):
            return root
        if len(found) > len(most_found):
            most_found = found
    missing = [task for task in wanted if task not in most_found]
    raise LayerfuseError(
        f"{folder} has no folder for {', '.join(missing)}; one for each of the tasks "
        f"{', '.join(wanted)} is expected, in it or in MME_Benchmark_release_version"
    )


def _read_task(root: Path, task: str) -> list[Item]:
    """The questions of one task.

    Raises:
        LayerfuseError: there are none, or a picture has not two.
    """
    pictures = root / task
    texts = root / task
    # Some tasks have folders of their own for pictures and texts.
    if (root / task / "questions_answers_YN").is_dir():
        pictures = root / task / "images"
        texts = root / task / "questions_answers_YN"
    # By the texts: a picture that nothing is asked about is no fault. Archives made on a Mac have
    # hidden files beside the texts.
    files = [file for file in sorted(texts.glob("*.txt")) if not file.name.startswith(".")]
    if not files:
        raise LayerfuseError(f"there are no questions *.txt in {texts}")
    items: list[Item] = []
    for file in files:
        items += _read_picture(task, pictures, file)
    return items


def _read_picture(task: str, pictures: Path, file: Path) -> list[Item]:
    """Both questions about one picture, which need not be there.

    Raises:
        LayerfuseError: a line is no question with its answer.
    """
    # The texts do not say of which kind a picture is. What the release has stands for one that is
    # missing: the ids of the questions are then the same.
    picture = f"{file.stem}{_suffix_in_release(task)}"
    for suffix in _PICTURE_SUFFIXES:
        if (pictures / f"{file.stem}{suffix}").is_file():
            picture = f"{file.stem}{suffix}"
            break
    # Some texts end with an empty line.
    lines = [line for line in text_files.read_text(file).split("\n") if line.strip()]
    if len(lines) != 2:
        raise LayerfuseError(
            f"{file} has {len(lines)} questions; MME has two for each picture, one a line"
        )
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        # The last tab, as a question about code may have others.
        question, tab, answer = line.strip().rpartition("\t")
        right = answer.strip().lower()
        if not tab or right not in ("yes", "no"):
            raise LayerfuseError(
                f"{file} has {short(line)} in line {number}; a question, a tab and Yes or No are "
                "expected"
            )
        item = Item(
            id=f"{task}/{picture}/{number}",
            pictures=(picture_file(pictures, picture),),
            question=bare_question(question),
            answers=(right,),
            group=task,
            together=f"{task}/{picture}",
        )
        items.append(item)
    return items


def _suffix_in_release(task: str) -> str:
    """What the names of a task's pictures end with in MME's release; see `llava_mme.jsonl`."""
    return ".png" if task in COGNITION else ".jpg"


def _task_score(task: str, answered: Sequence[JudgedItem]) -> Column:
    """Accuracy plus accuracy+ of a task: 100 for all questions, and 100 for all pictures.

    Raises:
        LayerfuseError: nothing of the task was answered.
    """
    if not answered:
        raise LayerfuseError(f"MME's scores need answers of all tasks; there are none of {task}")
    accuracy = share(answered).value
    accuracy_plus = groups_right("accuracy+", answered).value
    return Column(task, accuracy + accuracy_plus, 200.0, len(answered))


def _sum(name: str, tasks: Sequence[Column]) -> Column:
    """The sum of the scores of some tasks."""
    value = sum(task.value for task in tasks)
    best = sum(task.best for task in tasks)
    questions = sum(task.questions for task in tasks)
    return Column(name, value, best, questions)
