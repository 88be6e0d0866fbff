"""What tests of whole studies share: a recipe's files going in, results coming out.

The samples are those of the fixture `recipe`: `data.json`, conversations about one picture each.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import BertConfig, BertModel
from typer.testing import CliRunner, Result

from layerfuse_cli.app import app
from tests import tiny


def save_sentence_encoder(folder: Path) -> None:
    """Save a random sentence encoder whose embeddings have 16 numbers."""
    config = BertConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    BertModel(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    """Write `recipe.yaml`; the relative paths in it start from this folder."""
    path = folder / "recipe.yaml"
    # As a user's file: what a recipe must hold is checked when it is read.
    path.write_text(yaml.safe_dump(recipe))
    return path


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of `data.json` in this folder."""
    return json.loads((folder / "data.json").read_text())


def write_samples(folder: Path, samples: list[dict[str, Any]], name: str = "data.json") -> None:
    """Write samples as LLaVA's format has them: one list in one file."""
    (folder / name).write_text(json.dumps(samples))


def ask_several_questions(folder: Path) -> None:
    """Make three different questions of the one that all samples ask.

    Guided strategies are also asked with the question of another sample; with one question only,
    there is nothing to exchange.
    """
    samples = read_samples(folder)
    for number, sample in enumerate(samples):
        sample["conversations"][0]["value"] = f"<image> n{number % 3}?"
    write_samples(folder, samples)


def cut_in_half(file: Path) -> None:
    """Keep the first half of a file, as a download that broke off does."""
    # The beginning is left, so that the kind of file can still be told.
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line."""
    # An answer may hold a line separator; in JSON it is escaped, and ends no line.
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_results(study: Path) -> list[dict[str, Any]]:
    """The results of a study's finished runs."""
    return read_lines(study / "results.jsonl")


def read_left_out(study: Path) -> dict[str, Any]:
    """By stage and index, the id of each bad sample and why it is left out."""
    return json.loads((study / "left_out.json").read_text())


def comparable_results(study: Path) -> list[dict[str, Any]]:
    """The results without the durations, which differ each time."""
    results = read_results(study)
    for result in results:
        # All else is equal to the last bit in two trainings of the same run.
        del result["seconds"]
    return results


def times_of_results(study: Path) -> dict[Path, int]:
    """When each run wrote its result, in ns. A run that is done again writes it again."""
    times = {}
    for file in study.glob("arms/*/result.json"):
        times[file] = file.stat().st_mtime_ns
    return times


def run_study(recipe: Path, output: Path) -> Result:
    """`layerfuse study` as a user runs it."""
    # In this process: what the test has replaced stays replaced, and torch is imported already.
    return CliRunner().invoke(
        app,
        ["study", str(recipe), "--output", str(output)],
    )


def ask(model: Path, picture: str, question: str) -> Result:
    """`layerfuse ask` as a user runs it."""
    return CliRunner().invoke(
        app,
        ["ask", str(model), picture, question],
    )


def one_line(result: Result) -> str:
    """What a command said; a terminal's width breaks its sentences anywhere."""
    return " ".join(result.output.split())
