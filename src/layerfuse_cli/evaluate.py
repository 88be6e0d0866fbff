"""The verbs that test models and compare what they answered."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from layerfuse_cli.options import Imports, ModelFolder, import_strategies, is_given

if TYPE_CHECKING:
    from layerfuse.evaluate.suites import Suite

EVAL_OPTIONS = {
    "benchmarks": ("suite", "lmms"),
    "partial_average": ("suite",),
    "likelihood": ("suite",),
    "cached": ("suite", "data"),
    "dtype": ("suite", "data"),
    "split": ("data",),
    "column": ("data",),
    "ignore_column": ("data",),
    "literal_answers": ("data",),
    "max_new_tokens": ("data",),
    "controls": ("data",),
    "seed": ("data",),
    "lmms_include": ("lmms",),
}
"""Options of `eval` that are of use with some of what can be asked, and with what."""


def evaluate(
    context: typer.Context,
    model: ModelFolder,
    suite: Annotated[
        str | None, Option(help="A suite (see list suites), one benchmark, or a YAML file.")
    ] = None,
    data: Annotated[
        str | None,
        Option(help="A LLaVA JSON file, a folder of images, or a Hugging Face dataset."),
    ] = None,
    lmms: Annotated[
        str | None,
        Option(help="Tasks of lmms-eval, as mme,pope or vsr; needs lmms-eval (make test-lmms)."),
    ] = None,
    benchmarks: Annotated[
        Path,
        Option(help="With --suite and --lmms: the folder of the benchmarks, one for each inside."),
    ] = Path("benchmarks"),
    lmms_include: Annotated[
        Path | None, Option(help="With --lmms: a folder of further tasks, as YAML files.")
    ] = None,
    partial_average: Annotated[
        bool,
        Option("--partial-average", help="With --suite: average what there is."),
    ] = False,
    likelihood: Annotated[
        bool,
        Option(
            "--likelihood",
            help="With --suite: also choose among the possible answers of closed questions.",
        ),
    ] = False,
    cached: Annotated[
        bool,
        Option(
            "--cached",
            help="With --suite and --data: keep pictures' features in the cache, and read them.",
        ),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        Option(
            help="With --suite and --data: arithmetic.",
            show_default="as it was saved",
        ),
    ] = None,
    batch_invariant: Annotated[
        bool,
        Option(
            help="Ask again alone what is too close to call, so that no answer depends on the "
            "batch: hardly ever in float32, often of a weak model in bfloat16.",
        ),
    ] = True,
    split: Annotated[str, Option(help="With --data: split of a dataset.")] = "test",
    limit: Annotated[
        int | None,
        Option(
            help="Use only the first samples of the data, or of each task, or about so many "
            "questions of each benchmark of a suite.",
            min=1,
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        Option(help="What the data calls a column, as image=imgs; repeatable. As `columns`."),
    ] = None,
    ignore_column: Annotated[
        list[str] | None,
        Option(help="A column to leave out on purpose; repeatable. As `ignore_columns`."),
    ] = None,
    literal_answers: Annotated[
        bool, Option("--literal-answers", help="Markers such as <image> in answers are text.")
    ] = False,
    batch_size: Annotated[int, Option(help="Questions answered at once.", min=1)] = 32,
    max_new_tokens: Annotated[
        int | None,
        Option(help="With --data: longest answer, in tokens.", min=1, show_default="16"),
    ] = None,
    controls: Annotated[
        bool, Option("--controls", help="Also ask guided strategies without their guidance.")
    ] = False,
    seed: Annotated[int, Option(help="Seed of the resampling of pictures.", min=0)] = 0,
    output: Annotated[
        Path | None,
        Option(
            help="Folder of the results.",
            show_default="MODEL/evaluation/NAME, MODEL/suites/NAME, MODEL/lmms",
        ),
    ] = None,
    imports: Imports = None,
) -> None:
    """Test a trained model: a suite of benchmarks as papers print it, any data by family, or tasks
    of lmms-eval."""
    from layerfuse.errors import LayerfuseError

    import_strategies(imports)
    given = {"suite": suite, "data": data, "lmms": lmms}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) != 1:
        raise LayerfuseError("give --suite NAME, --data FILE or --lmms TASKS, one of them")
    _refuse_options(context, asked[0])
    if lmms is not None:
        from layerfuse.evaluate.lmms_run import evaluate_lmms

        evaluate_lmms(
            model,
            [name.strip() for name in lmms.split(",")],
            include=lmms_include,
            benchmarks=benchmarks,
            output=output,
            batch_size=batch_size,
            limit=limit,
            batch_invariant=batch_invariant,
        )
    elif suite is not None:
        from layerfuse.evaluate.suite_run import evaluate_suite
        from layerfuse.evaluate.suites import load_suite

        chosen = load_suite(suite)
        _refuse_benchmarks(context, chosen)
        evaluate_suite(
            model,
            chosen,
            benchmarks=benchmarks,
            output=output,
            batch_size=batch_size,
            partial_average=partial_average,
            likelihood=likelihood,
            cached=cached,
            dtype=dtype,
            batch_invariant=batch_invariant,
            limit=limit,
        )
    else:
        from layerfuse.evaluate.evaluation import data_of
        from layerfuse.evaluate.evaluation import evaluate as evaluate_data
        from layerfuse.recipe.evaluate_settings import Evaluation

        if is_given(context, "split") and Path(str(data)).is_file():
            raise LayerfuseError(f"--split is of a dataset, and {data} is a file: leave it out")
        tested = data_of(
            str(data),
            split,
            limit,
            columns=tuple(column or ()),
            ignore_columns=tuple(ignore_column or ()),
            literal_answers=literal_answers,
        )
        evaluation = Evaluation(
            data=tested,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens or 16,
            controls=("shuffled", "mean") if controls else (),
        )
        evaluate_data(
            model,
            evaluation,
            output=output,
            cached=cached,
            dtype=dtype,
            batch_invariant=batch_invariant,
            seed=seed,
        )


def _refuse_benchmarks(context: typer.Context, suite: "Suite") -> None:
    """Raise LayerfuseError for a folder of benchmarks where a suite needs none."""
    from layerfuse.errors import LayerfuseError
    from layerfuse.evaluate.suite_run import needs_files

    if is_given(context, "benchmarks") and not needs_files(suite):
        raise LayerfuseError(f"suite {suite.name!r} needs no files: leave --benchmarks out")


def _refuse_options(context: typer.Context, asked: str) -> None:
    """Raise LayerfuseError for options of `eval` that were given and would change nothing.

    Args:
        context: of the command line.
        asked: what is asked: `suite`, `data` or `lmms`.
    """
    from layerfuse.errors import LayerfuseError

    for name, useful in EVAL_OPTIONS.items():
        if asked not in useful and is_given(context, name):
            option = name.replace("_", "-")
            others = " or ".join(f"--{other}" for other in useful)
            raise LayerfuseError(f"--{option} goes with {others} alone")


def compare(
    context: typer.Context,
    runs: Annotated[
        list[str],
        Argument(help="Folders of answers, as `eval --suite` writes them, or NAME=FOLDER."),
    ],
    suite: Annotated[str, Option(help="The suite that they are compared on.")],
    benchmarks: Annotated[
        Path, Option(help="The folder of the benchmarks, one for each inside.")
    ] = Path("benchmarks"),
    baseline: Annotated[
        str | None, Option(help="The run to compare with.", show_default="the first")
    ] = None,
    published: Annotated[
        bool, Option("--published/--no-published", help="Rows of papers below the runs.")
    ] = True,
    form: Annotated[
        Literal["terminal", "markdown", "latex", "csv"], Option("--format", help="Of the tables.")
    ] = "terminal",
    resamples: Annotated[int, Option(help="Number of redrawn sets of pictures.", min=100)] = 1000,
    seed: Annotated[int, Option(help="Seed of the redrawing.", min=0)] = 0,
    output: Annotated[
        Path | None, Option(help="Also write comparison.json, the tables and figures there.")
    ] = None,
) -> None:
    """Compare runs by their answers, paired over pictures, beside published rows."""
    from layerfuse.errors import LayerfuseError
    from layerfuse.evaluate.compare_report import report_comparison
    from layerfuse.evaluate.suites import load_suite

    if len(runs) == 1:
        # One run stands beside published rows alone: nothing is redrawn.
        for name in ("baseline", "resamples", "seed"):
            if is_given(context, name):
                raise LayerfuseError(f"--{name} compares runs, and there is one: leave it out")
    _refuse_benchmarks(context, load_suite(suite))
    report_comparison(
        runs,
        suite,
        benchmarks=benchmarks,
        baseline=baseline,
        published=published,
        form=form,
        resamples=resamples,
        seed=seed,
        output=output,
    )


def list_suites() -> None:
    """Every suite of benchmarks, with its columns and where they come from."""
    from layerfuse.evaluate.listings import list_suites

    list_suites()


def list_benchmarks() -> None:
    """Every benchmark with the files that it expects, and its licence."""
    from layerfuse.evaluate.listings import list_benchmarks

    list_benchmarks()
