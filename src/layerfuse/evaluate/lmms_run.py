"""Ask a model tasks of lmms-eval, in this process and by lmms-eval's own evaluator."""

import json
import os
from argparse import Namespace
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from transformers.utils import logging as transformers_logging

from layerfuse.errors import LayerfuseError
from layerfuse.evaluate.lmms_requests import MODEL
from layerfuse.evaluate.lmms_tasks.local_files import BENCHMARKS_VARIABLE
from layerfuse.files import write_text
from layerfuse.tables import Heading, print_fitted

OWN_TASKS = Path(__file__).parent / "lmms_tasks"
"""Tasks that lmms-eval lacks."""
RESULTS = "results.json"
"""What lmms-eval reports of all tasks."""
SAMPLES = "samples"
"""The folder of the answers, one file of JSON lines for each task."""
GROUP = "lmms_eval.models"
"""The group of entry points in which lmms-eval looks for plug-ins."""
LIKELIHOOD_TYPES = ("loglikelihood", "multiple_choice")
"""What lmms-eval asks simple models alone; it asks chat models to generate."""
BY_TASK = ("results", "groups", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
"""Parts of lmms-eval's results that are sorted by task."""
REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
"""What the command line of lmms-eval cuts out of answers before they are scored."""


@dataclass(frozen=True)
class _LmmsEval:
    """The modules of lmms-eval. (`Any`: it is not installed where types are checked.)"""

    evaluator: Any
    models: Any
    tasks: Any
    utils: Any
    retry_error: Any
    """what the library raises that lmms-eval tries things again with"""


@dataclass(frozen=True)
class _Selection:
    """Chosen tasks, and what knows them."""

    # Any: lmms-eval's own class
    manager: Any
    names: list[str]
    is_simple: bool = False
    """whether the simple class of the plug-in is asked, not the one for messages"""


def evaluate_lmms(
    model: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    benchmarks: Path = Path("benchmarks"),
    output: Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    batch_invariant: bool = True,
    console: Console | None = None,
) -> Path:
    """Ask a trained model tasks of lmms-eval, and write what it scores.

    Tasks that compare likelihoods are asked as texts with pictures, all others as messages, which
    is what lmms-eval can do with either.

    Args:
        model: its folder.
        tasks: names of lmms-eval's tasks, groups and tags, of those in `include` and of
            layerfuse's own; `*` stands for any letters.
        include: a folder of further tasks.
        benchmarks: the folder of the files of layerfuse's own tasks.
        output: where results and answers go. Default: `lmms` in the model's folder.
        batch_size: requests answered at once.
        limit: use only the first questions of each task.
        batch_invariant: ask again alone what is too close to call.
        console: where to print; the terminal by default.

    Returns:
        The folder that was written.

    Raises:
        LayerfuseError: lmms-eval or the plug-in cannot be loaded, a task is not known or its data
            are not at hand, or there is no model.
    """
    if console is None:
        console = Console()
    library = _load_library()
    _check_plugin(library)
    # Before the model: names are checked in seconds, while a large model loads for minutes.
    selections = _by_class(library, _select(library, tasks, include))

    transformers_logging.disable_progress_bar()
    folder = output or model / "lmms"
    # Any: the plug-in's classes have a base of lmms-eval
    loaded: Any = None
    results: list[dict[str, Any]] = []
    with _benchmarks_at(benchmarks):
        for selection in selections:
            model_class = library.models.get_model(MODEL, selection.is_simple)
            # The weights are loaded once.
            answerer = None if loaded is None else loaded.answerer
            loaded = model_class(
                pretrained=model,
                batch_size=batch_size,
                batch_invariant=batch_invariant,
                answerer=answerer,
            )
            result = _simple_evaluate(
                library, loaded, selection, name=str(model), folder=folder, limit=limit
            )
            # Of several processes the first alone has results.
            if result is not None:
                results.append(result)
    if results:
        _write(library, results, str(model), folder)
        _print(results, console)
        place = f"answers and scores: {folder}"
        console.print(place, markup=False, highlight=False, soft_wrap=True)
    return folder


def _load_library() -> _LmmsEval:
    """The modules of lmms-eval.

    Raises:
        LayerfuseError: it is not installed, or lacks something.
    """
    try:
        # First: it sets how much lmms-eval prints.
        evaluator = import_module("lmms_eval.evaluator")
        return _LmmsEval(
            evaluator=evaluator,
            models=import_module("lmms_eval.models"),
            tasks=import_module("lmms_eval.tasks"),
            utils=import_module("lmms_eval.utils"),
            retry_error=import_module("tenacity").RetryError,
        )
    except ImportError as error:
        raise LayerfuseError(
            f"cannot import lmms-eval: {error}. It needs an environment of its own, in which "
            "layerfuse is installed too: `make test-lmms` builds one (.venv-lmms), and "
            "tests/lmms/requirements.txt says what is in it"
        ) from error


def _check_plugin(library: _LmmsEval) -> None:
    """Raise LayerfuseError where lmms-eval does not know the plug-in: it only warns of a plug-in
    that fails to load, and leaves out all that come after it."""
    if MODEL in library.models.list_available_models():
        return
    found = entry_points(group=GROUP)
    for entry in found:
        try:
            payload = entry.load()
            if callable(payload):
                payload()
        # Whatever a plug-in raises is the reason that is looked for.
        except Exception as error:
            raise LayerfuseError(
                f"the plug-in {entry.name!r} of lmms-eval ({entry.value}) does not load: "
                f"{type(error).__name__}: {error}"
            ) from error
    raise LayerfuseError(
        f"lmms-eval does not know the model {MODEL!r}: of the entry points {GROUP!r} there are "
        f"{[entry.name for entry in found]}. Install layerfuse again in this environment"
    )


def _select(library: _LmmsEval, tasks: Sequence[str], include: Path | None) -> _Selection:
    """The tasks of the given names.

    Raises:
        LayerfuseError: a name is not known, or known to two, or there is no such folder.
    """
    folders = [str(OWN_TASKS)]
    if include is not None:
        if not include.is_dir():
            raise LayerfuseError(f"no folder {include} of tasks")
        folders.append(str(include))
    manager_class = library.tasks.TaskManager
    # Alone first: to read lmms-eval's own two thousand tasks takes seconds.
    manager = manager_class(include_path=folders, include_defaults=False, model_name=MODEL)
    of_folders = set(manager.all_tasks)
    if not all(manager.match_tasks([name]) for name in tasks):
        manager = manager_class(include_path=folders, model_name=MODEL)
    names: list[str] = []
    for name in tasks:
        matching = manager.match_tasks([name])
        if not matching:
            raise LayerfuseError(
                f"lmms-eval knows no task {name!r}; `lmms-eval tasks` lists them, and "
                "--lmms-include names a folder of further ones"
            )
        names += [match for match in matching if match not in names]
    for name in names:
        # lmms-eval would take its own without a word.
        is_own = Path(str(manager.task_index[name]["yaml_path"])).is_relative_to(
            Path(library.tasks.__file__).parent
        )
        if name in of_folders and is_own:
            raise LayerfuseError(
                f"lmms-eval has a task {name!r} of its own: give yours another name"
            )
    return _Selection(manager, names)


def _by_class(library: _LmmsEval, selection: _Selection) -> list[_Selection]:
    """The chosen tasks, apart by the class of the plug-in that is asked; none that is empty."""
    by_messages: list[str] = []
    by_likelihood: list[str] = []
    for name in selection.names:
        types = _output_types(library, selection.manager, name)
        if types.isdisjoint(LIKELIHOOD_TYPES):
            by_messages.append(name)
        else:
            by_likelihood.append(name)
    selections: list[_Selection] = []
    if by_messages:
        selections.append(_Selection(selection.manager, by_messages))
    if by_likelihood:
        selections.append(_Selection(selection.manager, by_likelihood, is_simple=True))
    return selections


def _output_types(library: _LmmsEval, manager: Any, name: str) -> set[str]:
    """What a task asks for, or what those of a group or tag ask for."""
    if name not in manager.task_index:
        # Written out within a group, which is seldom done.
        return set()
    entry = manager.task_index[name]
    if entry["type"] == "tag":
        members = entry["task"]
    else:
        # Without the functions that it names, which may need packages.
        config = library.utils.load_yaml_config(entry["yaml_path"], mode="simple")
        if entry["type"] != "group":
            return {config.get("output_type", "generate_until")}
        members = config["task"]
    types: set[str] = set()
    for member in members:
        # A group may change options of a task, which it then names in a mapping.
        inner: Any = member
        if isinstance(member, dict):
            inner = cast("dict[str, Any]", member)["task"]
        if isinstance(inner, str):
            types |= _output_types(library, manager, inner)
    return types


@contextmanager
def _benchmarks_at(folder: Path) -> Generator[None]:
    """Tell layerfuse's own tasks where their files are: lmms-eval gives them no options."""
    before = os.environ.get(BENCHMARKS_VARIABLE)
    os.environ[BENCHMARKS_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[BENCHMARKS_VARIABLE]
        else:
            os.environ[BENCHMARKS_VARIABLE] = before


def _simple_evaluate(
    library: _LmmsEval,
    model: Any,
    selection: _Selection,
    *,
    name: str,
    folder: Path,
    limit: int | None,
) -> dict[str, Any] | None:
    """What lmms-eval reports of tasks.

    Args:
        library: lmms-eval.
        model: an object of the plug-in's class.
        selection: the tasks.
        name: of the model, for the results.
        folder: where tasks may write files for test servers.
        limit: use only the first questions.

    Returns:
        The results; None in all processes but the first.

    Raises:
        LayerfuseError: a task gave up after trying several times, or needs another package.
    """
    # As lmms-eval's command line has them; a few tasks read them.
    arguments = Namespace(
        output_path=str(folder), process_with_media=False, reasoning_tags=REASONING_TAGS
    )
    try:
        return library.evaluator.simple_evaluate(
            model=model,
            model_args=f"pretrained={name}",
            tasks=selection.names,
            batch_size=model.batch_size,
            limit=limit,
            task_manager=selection.manager,
            cli_args=arguments,
            verbosity="WARNING",
        )
    # Of lmms-eval's own packages those of single tasks are left out.
    except ImportError as error:
        raise LayerfuseError(
            f"a task among {', '.join(selection.names)} needs a package that is not installed: "
            f"{error.__cause__ or error}"
        ) from error
    # It reads data, and scores answers, up to five times.
    except library.retry_error as error:
        reason = error.last_attempt.exception()
        if isinstance(reason, LayerfuseError):
            raise reason from error
        raise LayerfuseError(
            f"lmms-eval could not read the data or score the answers of "
            f"{', '.join(selection.names)}: {type(reason).__name__}: {reason}"
        ) from reason


def _write(
    library: _LmmsEval, results: Sequence[Mapping[str, Any]], model: str, folder: Path
) -> None:
    """Write the results and the answers of all tasks."""
    whole: dict[str, Any] = {
        "model": model,
        "lmms_eval": version("lmms-eval"),
        "config": [result["config"] for result in results],
    }
    for part in BY_TASK:
        whole[part] = {}
        for result in results:
            whole[part].update(result.get(part, {}))
    as_text = library.utils.handle_non_serializable
    for result in results:
        for task, samples in result["samples"].items():
            lines: list[str] = []
            # Several processes answer every second question each, and come one after another.
            for sample in sorted(samples, key=_place):
                lines.append(json.dumps(sample, default=as_text, ensure_ascii=False) + "\n")
            write_text(folder / SAMPLES / f"{task}.jsonl", "".join(lines))
    # Last: where it is, the answers are there too.
    write_text(folder / RESULTS, json.dumps(whole, default=as_text, indent=1) + "\n")


def _place(sample: Mapping[str, Any]) -> int:
    """The place of a question in its task's dataset."""
    return sample["doc_id"]


def _print(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print every number that lmms-eval reports, on its own scale."""
    headings = [
        Heading("task"),
        Heading("metric"),
        Heading("value", is_number=True),
        Heading("standard error", is_number=True),
        Heading("questions", is_number=True),
    ]
    rows: list[list[str]] = []
    for result in results:
        for task, numbers in result["results"].items():
            questions = result["n-samples"].get(task, {}).get("effective", "")
            for key, value in numbers.items():
                # A metric's name is followed by that of the filter which the answers went through.
                metric, comma, through = key.partition(",")
                if not comma or metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
                    continue
                error = numbers.get(f"{metric}_stderr,{through}")
                rows.append([task, metric, _number(value), _number(error), str(questions)])
    print_fitted(console, headings, rows, title="lmms-eval")


def _number(value: Any) -> str:
    """A number of lmms-eval, which has texts and empty lists in the place of some."""
    if isinstance(value, int | float):
        return f"{value:.4f}"
    return "" if value is None else str(value)
