"""Tiny tasks for lmms-eval on disk: YAML files, their functions, and drawn pictures."""

from pathlib import Path

from PIL import Image

COLOURS = ("red", "lime", "blue", "white", "black")
PICTURES = (1, 0, 2, 1, 1)
"""how many pictures each question shows"""
OPTIONS = ["a dog", "cat", "two of them"]
LONGEST = 5
"""longest answer, in tokens"""
ROUNDS = (2, 3, 2, 2, 3)
"""how many rounds each question has"""

FUNCTIONS = """
from pathlib import Path

ROUNDS = {rounds}


def pictures(doc):
    return list(doc["pictures"])


def missing_picture(doc):
    return [str(Path("no such folder") / "1.png")]


def words(doc):
    return doc["question"]


def options(doc):
    return {options}


def said(doc, results):
    return {{"said": 1.0}}


def round_words(
    doc,
    lmms_eval_specific_kwargs=None,
    previous_output=None,
    round_idx=None,
    previous_round_info=None,
):
    if round_idx is None:
        return doc["question"]
    info = (previous_round_info or []) + [round_idx]
    if round_idx == ROUNDS[doc["number"]]:
        return None, None, True, previous_output, info
    text = f"You said {{previous_output[-1]!r}} in round {{round_idx}}. And now?"
    return list(doc["pictures"])[:1], text, False, previous_output, info


def endless(doc, lmms_eval_specific_kwargs=None, previous_output=None, **others):
    if previous_output is None:
        return doc["question"]
    return [], "And now?", False, previous_output, None


def messages(doc):
    content = [{{"type": "text", "text": "Look:"}}]
    for picture in doc["pictures"]:
        content.append({{"type": "image", "url": picture}})
        content.append({{"type": "text", "text": " and "}})
    content.append({{"type": "text", "text": doc["question"]}})
    return [
        {{"role": "system", "content": [{{"type": "text", "text": "Be brief."}}]}},
        {{"role": "user", "content": content}},
    ]
"""

SHARED = """
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
task: {name}
doc_to_visual: !function functions.{visual}
doc_to_text: !function functions.{text}
doc_to_target: answer
"""
GENERATED = """
process_results: !function functions.said
generation_kwargs: {{max_new_tokens: {longest}, do_sample: false, until: {until}}}
metric_list:
  - {{metric: said, aggregation: mean, higher_is_better: true}}
"""


def drawn(number: int) -> list[Image.Image]:
    """The pictures of a question."""
    images: list[Image.Image] = []
    for place in range(PICTURES[number]):
        image = Image.new("RGB", (40, 30), COLOURS[number])
        image.paste("grey", (0, 0, 10 + place, 10))
        images.append(image)
    return images


def question(number: int) -> str:
    """The words of a question, one of which speaks of HTML."""
    if number == 3:
        return "What do <image> and <image> mean?"
    return f"What is in picture {number}?"


def _write_dataset(folder: Path) -> None:
    """Write the questions with their pictures."""
    from datasets import Dataset, DatasetDict, Features, List, Value
    from datasets import Image as ImageFeature

    rows = []
    for number in range(len(PICTURES)):
        row = {
            "number": number,
            "pictures": drawn(number),
            "question": question(number),
            "answer": number % len(OPTIONS),
        }
        rows.append(row)
    features = Features(
        {
            "number": Value("int64"),
            "pictures": List(ImageFeature()),
            "question": Value("string"),
            "answer": Value("int64"),
        }
    )
    dataset = Dataset.from_list(rows, features=features)
    DatasetDict({"test": dataset}).save_to_disk(str(folder))


def write_tasks(folder: Path, until: str = "[]") -> None:
    """Write the tasks `tiny_*`.

    Args:
        folder: is made.
        until: the texts that end an answer, as YAML.
    """
    _write_dataset(folder / "data")
    functions = FUNCTIONS.format(options=OPTIONS, rounds=ROUNDS)
    (folder / "functions.py").write_text(functions)

    generated = GENERATED.format(longest=LONGEST, until=until)
    bodies = {
        "tiny_text": ("pictures", "words", generated),
        "tiny_messages": (
            "pictures",
            "words",
            generated + "doc_to_messages: !function functions.messages\n",
        ),
        "tiny_missing": ("missing_picture", "words", generated),
        "tiny_rounds": (
            "pictures",
            "round_words",
            generated + "output_type: generate_until_multi_round\n",
        ),
        "tiny_endless": (
            "pictures",
            "endless",
            generated + "output_type: generate_until_multi_round\n",
        ),
        "tiny_options": (
            "pictures",
            "words",
            "doc_to_choice: !function functions.options\noutput_type: multiple_choice\n"
            "metric_list:\n"
            "  - {metric: acc, aggregation: mean, higher_is_better: true}\n",
        ),
    }
    for name, (visual, text, body) in bodies.items():
        head = SHARED.format(data=folder / "data", name=name, visual=visual, text=text)
        (folder / f"{name}.yaml").write_text(head + body)
