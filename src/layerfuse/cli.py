"""The command line: verbs only, everything heavy is imported when a verb runs."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from layerfuse import __version__
from layerfuse.errors import LayerfuseError


class Verbs(TyperGroup):
    """The root command, the one place that turns errors of any verb into a message."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb of the command line.

        Args:
            ctx: the context of the command line, whose `debug` is the option of the root command.
                (`Any`: some versions of typer bring a click of their own.)

        Returns:
            What the verb returns.

        Raises:
            typer.Exit: with code 2, after the message, for what the user can mend.
            Exception: every other error with its traceback; with `--debug`, all of them.
        """
        try:
            return super().invoke(ctx)
        except LayerfuseError as error:
            if ctx.params["debug"]:
                raise
            typer.secho(f"error: {error}", fg="red", err=True)
            typer.secho("(layerfuse --debug VERB ... shows the traceback)", dim=True, err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which layers of a vision encoder to use in a multimodal LLM, and how to fuse them.",
)
models = typer.Typer(no_args_is_help=True, help="Pretrained models for machines without a hub.")
app.add_typer(models, name="models")
cache = typer.Typer(no_args_is_help=True, help="Features of pictures that were encoded before.")
app.add_typer(cache, name="cache")
listing = typer.Typer(no_args_is_help=True, help="Tables of what there is.")
app.add_typer(listing, name="list")

RecipeFile = Annotated[Path, Argument(help="A recipe, for example recipes/quickstart.yaml")]
Overrides = Annotated[list[str] | None, Argument(help="Changes to the recipe: key.sub=value ...")]
Imports = Annotated[
    list[str] | None,
    Option("--import", help="A Python module that registers fusion strategies; repeatable."),
]
Encoder = Annotated[str, Argument(help="A local model, hub id or folder with an encoder.")]
Pictures = Annotated[
    str | None,
    Argument(
        help="A folder of images, a LLaVA JSON or a dataset. Default: generated and scikit-image's"
    ),
]
Output = Annotated[Path | None, Option(help="Results folder.", show_default="runs/look-<encoder>")]
Number = Annotated[Literal["float32", "bfloat16"], Option(help="Arithmetic of the encoder.")]
Batch = Annotated[int, Option(help="Pictures encoded at once.", min=1)]
ModelFolder = Annotated[
    Path, Argument(help="Folder of a trained model, for example runs/<study>/arms/<arm>/model")
]
Tasks = Annotated[str | None, Option(help="Tasks, as count,shape. Default: all")]
ProbeData = Annotated[str | None, Option(help="LLaVA JSON with short answers. Default: scenes")]
ProbeTest = Annotated[str | None, Option(help="The same to test on. Default: 3/10 of the data")]


def _refuse_options(context: typer.Context, asked: str) -> None:
    """Raise LayerfuseError for options of `eval` that were given and would change nothing.

    Args:
        context: of the command line.
        asked: what is asked: `suite`, `data` or `lmms`.
    """
    for name, useful in EVAL_OPTIONS.items():
        if asked not in useful and _is_given(context, name):
            option = name.replace("_", "-")
            others = " or ".join(f"--{other}" for other in useful)
            raise LayerfuseError(f"--{option} goes with {others} alone")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, even with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _import_strategies(modules: list[str] | None) -> None:
    """Import the user's modules, so that the strategies they register have names.

    Args:
        modules: names of modules, as given to `--import`.

    Raises:
        LayerfuseError: a name is none of a module; a module is missing or lacks a package.
    """
    if not modules:
        return
    for name in modules:
        # Paths to files are the usual mistake, which Python reads as a relative import.
        if not all(part.isidentifier() for part in name.split(".")):
            raise LayerfuseError(
                f"--import {name!r} is no name of a module; write it as Python imports it: "
                "my_fusion for my_fusion.py in the working directory, package.module for one in a "
                "package"
            )
    # A module beside the recipe is found as it is by `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            raise LayerfuseError(f"--import {name}: {error}") from error


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For verbs that are done in seconds: a fifth of them went into looking for cycles among the
    objects of the modules that they import, none of which can be freed."""
    gc.disable()
    try:
        yield
    finally:
        # The last search, when the process ends, leaves these out too.
        gc.freeze()
        gc.enable()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layerfuse {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    debug: Annotated[bool, Option("--debug", help="Show tracebacks of all errors.")] = False,
    version: Annotated[
        bool,
        Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None: ...


@app.command()
def study(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, Option(help="Folder of the study.", show_default="runs/<name>")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], Option(help="On this machine, or on a cluster by Ray.")
    ] = "local",
    imports: Imports = None,
) -> None:
    """Train and compare every arm of a recipe, and write report.html. Continues what was begun."""
    from layerfuse.study.coordinate import study

    _import_strategies(imports)
    report = study(
        recipe,
        tuple(overrides or ()),
        output=output,
        engine=engine,
        modules=tuple(imports or ()),
    )
    typer.echo(f"report: {report}")


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    arm: Annotated[
        str | None, Option(help="Name of the arm.", show_default="the recipe's only arm")
    ] = None,
    seed: Annotated[
        int | None, Option(help="Seed of the run.", show_default="the arm's first", min=0)
    ] = None,
    output: Annotated[
        Path | None, Option(help="Folder of the run.", show_default="runs/<name>.<arm>.seed<seed>")
    ] = None,
    imports: Imports = None,
) -> None:
    """Train and test one arm of a recipe, without a report. Continues what was begun."""
    from layerfuse.study.coordinate import train

    _import_strategies(imports)
    trained = train(
        recipe,
        tuple(overrides or ()),
        arm=arm,
        seed=seed,
        output=output,
        modules=tuple(imports or ()),
    )
    typer.echo(f"accuracy: {trained.record.scores.mean:.3f}")
    typer.echo(f"model: {trained.model}")


EVAL_OPTIONS = {
    "benchmarks": ("suite", "lmms"),
    "partial_average": ("suite",),
    "likelihood": ("suite",),
    "split": ("data",),
    "limit": ("data", "lmms"),
    "column": ("data",),
    "ignore_column": ("data",),
    "literal_answers": ("data",),
    "max_new_tokens": ("data",),
    "controls": ("data",),
    "seed": ("data",),
    "lmms_include": ("lmms",),
}
"""Options of `eval` that are of use with some of what can be asked, and with what."""


@app.command("eval")
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
    split: Annotated[str, Option(help="With --data: split of a dataset.")] = "test",
    limit: Annotated[
        int | None,
        Option(help="With --data: use only the first samples. With --lmms: of each task.", min=1),
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
            show_default="MODEL/evaluation, MODEL/suites/NAME, MODEL/lmms",
        ),
    ] = None,
    imports: Imports = None,
) -> None:
    """Test a trained model: a suite of benchmarks as papers print it, any data by family, or tasks
    of lmms-eval."""
    _import_strategies(imports)
    given = {"suite": suite, "data": data, "lmms": lmms}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) != 1:
        raise LayerfuseError("give --suite NAME, --data FILE or --lmms TASKS, one of them")
    _refuse_options(context, asked[0])
    if lmms is not None:
        from layerfuse.evaluate.lmms_run import evaluate_lmms

        folder = evaluate_lmms(
            model,
            [name.strip() for name in lmms.split(",")],
            include=lmms_include,
            benchmarks=benchmarks,
            output=output,
            batch_size=batch_size,
            limit=limit,
        )
        typer.echo(f"answers and scores: {folder}")
        return

    if suite is not None:
        from layerfuse.evaluate.suite_run import evaluate_suite, needs_files
        from layerfuse.evaluate.suites import load_suite

        chosen = load_suite(suite)
        if _is_given(context, "benchmarks") and not needs_files(chosen):
            raise LayerfuseError(f"suite {chosen.name!r} needs no files: leave --benchmarks out")
        folder = evaluate_suite(
            model,
            chosen,
            benchmarks=benchmarks,
            output=output,
            batch_size=batch_size,
            partial_average=partial_average,
            likelihood=likelihood,
        )
        typer.echo(f"answers and scores: {folder}")
        return

    from layerfuse.evaluate.evaluation import data_of, evaluate
    from layerfuse.recipe.evaluate_settings import Evaluation

    if _is_given(context, "split") and Path(str(data)).is_file():
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
    folder = evaluate(model, evaluation, output=output, seed=seed)
    typer.echo(f"answers and scores: {folder}")


@app.command()
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
    from layerfuse.evaluate.compare_report import report_comparison

    if len(runs) == 1:
        # One run stands beside published rows alone: nothing is redrawn.
        for name in ("baseline", "resamples", "seed"):
            if _is_given(context, name):
                raise LayerfuseError(f"--{name} compares runs, and there is one: leave it out")
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


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None, imports: Imports = None) -> None:
    """Resolve a recipe and print its parameters, tokens, steps and FLOPs, without any weights."""
    with _no_garbage_collection():
        from layerfuse.cost.recipe_table import show
        from layerfuse.evaluate.planning import planned

        _import_strategies(imports)
        resolved, _ = show(recipe, tuple(overrides or ()))
        typer.echo(planned(resolved))


@app.command()
def similarity(
    encoder: Encoder,
    images: Pictures = None,
    other: Annotated[str | None, Option(help="A second encoder to compare with.")] = None,
    by: Annotated[
        str, Option(help="What makes the groups: cosine[_centred], cka_tokens or cka_images.")
    ] = "cosine",
    groups: Annotated[
        int, Option(help="Number of groups; 0: the widest mean silhouette.", min=0)
    ] = 3,
    split: Annotated[str, Option(help="Split of a dataset.")] = "train",
    limit: Annotated[int | None, Option(help="Use only the first pictures.", min=1)] = None,
    batch_size: Batch = 16,
    dtype: Number = "float32",
    seed: Annotated[int, Option(help="Seed of the sample of tokens.", min=0)] = 0,
    output: Output = None,
) -> None:
    """How alike the layers of an encoder are: cosine, CKA, groups, scores. Continues if killed."""
    from layerfuse.look.similarity import similarity

    similarity(
        encoder,
        images,
        other=other,
        by=by,
        groups=groups,
        split=split,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        seed=seed,
        output=output,
    )


@app.command()
def probe(
    encoder: Encoder,
    data: ProbeData = None,
    test: ProbeTest = None,
    tasks: Tasks = None,
    layers: Annotated[
        list[str] | None,
        Option(help="A combination of layers to probe too; repeatable. Default: two triples"),
    ] = None,
    grid: Annotated[int, Option(help="Side of the grid of pooled tokens.", min=1)] = 4,
    batch_size: Batch = 16,
    dtype: Number = "float32",
    seed: Annotated[int, Option(help="Seed of splits and resamples.", min=0)] = 0,
    output: Output = None,
) -> None:
    """What each layer knows: linear probes per layer and task, with intervals and figures."""
    from layerfuse.look.probe import probe

    probe(
        encoder,
        data,
        test,
        tasks=tasks,
        layers=layers,
        grid=grid,
        batch_size=batch_size,
        dtype=dtype,
        seed=seed,
        output=output,
    )


@app.command()
def screen(
    recipe: RecipeFile,
    overrides: Overrides = None,
    teacher: Annotated[
        str | None,
        Option(
            help="An arm of the recipe, or the folder of a trained model of the same models.",
            show_default="the arm that reads the most layers",
        ),
    ] = None,
    study: Annotated[
        Path | None,
        Option(
            help="A study of this recipe: its trained teacher is used, its results are compared.",
            show_default="runs/<name>",
        ),
    ] = None,
    limit: Annotated[
        int, Option(help="Training pictures whose tokens are fitted, at most.", min=5)
    ] = 2000,
    output: Annotated[
        Path | None, Option(help="Folder of the screening.", show_default="runs/<name>/screen")
    ] = None,
    imports: Imports = None,
) -> None:
    """Train one arm, and judge the others by it in seconds each. Continues what was begun."""
    from layerfuse.study.screen import screen

    _import_strategies(imports)
    file = screen(
        recipe,
        tuple(overrides or ()),
        teacher=teacher,
        study=study,
        limit=limit,
        output=output,
        modules=tuple(imports or ()),
    )
    typer.echo(f"screening: {file}")


@app.command()
def recommend(
    encoder: Encoder,
    images: Pictures = None,
    data: ProbeData = None,
    test: ProbeTest = None,
    tasks: Tasks = None,
    recipe: Annotated[Path | None, Option(help="A recipe that the arms are for.")] = None,
    against: Annotated[
        Path | None, Option(help="A finished study: how well do the criteria rank its arms?")
    ] = None,
    dtype: Number = "float32",
    output: Output = None,
) -> None:
    """Which layers to train with first, with the evidence, and as arms of a recipe."""
    from layerfuse.look.recommend import recommend

    recommend(
        encoder,
        images=images,
        data=data,
        test=test,
        tasks=tasks,
        recipe=recipe,
        against=against,
        dtype=dtype,
        output=output,
    )


@listing.command("suites")
def list_suites() -> None:
    """Every suite of benchmarks, with its columns and where they come from."""
    from layerfuse.evaluate.listings import list_suites

    list_suites()


@listing.command("benchmarks")
def list_benchmarks() -> None:
    """Every benchmark with the files that it expects, and its licence."""
    from layerfuse.evaluate.listings import list_benchmarks

    list_benchmarks()


@listing.command("fusions")
def list_fusions(
    encoder: Annotated[
        str, Option(help="Encoder: a local model, hub id, folder, or clip-l-336.")
    ] = "clip-l-336",
    llm: Annotated[
        str, Option(help="LLM: a local model, hub id, folder, or vicuna-7b.")
    ] = "vicuna-7b",
    imports: Imports = None,
) -> None:
    """Every fusion strategy with what it costs beyond `single`, counted without any weights."""
    with _no_garbage_collection():
        from layerfuse.cost.fusions_table import list_fusions

        _import_strategies(imports)
        list_fusions(encoder, llm)


@app.command()
def ask(
    model: ModelFolder,
    image: Annotated[Path, Argument(help="A picture.")],
    question: Annotated[str, Argument(help="The question.")],
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.", min=1)] = 64,
    imports: Imports = None,
) -> None:
    """Ask a trained model one question about one picture."""
    from layerfuse.evaluate.answer import ask_model

    _import_strategies(imports)
    typer.echo(ask_model(model, image, question, max_new_tokens))


@cache.command("list")
def cache_list() -> None:
    """What the cache holds, by encoder, preprocessing and layer."""
    from layerfuse.data.feature_shards import describe

    for line in describe():
        typer.echo(line)


@cache.command("verify")
def cache_verify() -> None:
    """Read everything; drop what is damaged, so that it is encoded again when it is needed."""
    from layerfuse.data.feature_shards import drop_damaged

    num_damaged = 0
    for line in drop_damaged():
        typer.echo(line)
        num_damaged += 1
    if num_damaged:
        raise typer.Exit(1)
    typer.echo("nothing is damaged")


@cache.command("clear")
def cache_clear(
    name: Annotated[
        str | None, Argument(help="The beginning of a name in `cache list`. Default: all")
    ] = None,
) -> None:
    """Remove cached features."""
    from layerfuse.data.feature_shards import clear

    freed_bytes = clear(name)
    typer.echo(f"{freed_bytes / 1e9:.2f} GB freed")


@models.command("list")
def list_models() -> None:
    """Show the local models and where they are."""
    from layerfuse.local_models.registry import MODELS, folder, is_pulled

    for name, model in MODELS.items():
        where = str(folder(name)) if is_pulled(name) else "not pulled"
        typer.echo(f"{name}: {model.kind}, {model.hub_id}, {model.licence}, {where}")


@models.command()
def pull(
    names: Annotated[
        list[str] | None, Argument(help="Names of local models.", show_default="all")
    ] = None,
    force: Annotated[bool, Option(help="Convert again what is there.")] = False,
) -> None:
    """Download and convert local models into ordinary Hugging Face folders."""
    from layerfuse.local_models.registry import MODELS, folder, pull

    def say(phase: str, done: int, total: int, note: str = "") -> None:
        typer.echo(phase)

    chosen = names or list(MODELS)
    # An unknown name is refused before the first download, not after it.
    for name in chosen:
        folder(name)
    for name in chosen:
        where = pull(name, force=force, progress=say)
        typer.echo(f"{name}: {where}")


if __name__ == "__main__":
    app()
