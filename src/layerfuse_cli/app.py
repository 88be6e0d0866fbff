"""The command line: verbs only, everything heavy is imported when a verb runs."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from layerfuse_cli.demo import demo
from layerfuse_cli.evaluate import compare, evaluate, list_benchmarks, list_suites
from layerfuse_cli.explain import guidance, inspect, redraw
from layerfuse_cli.options import (
    AspectRatio,
    Batch,
    Encoder,
    Imports,
    ModelFolder,
    Number,
    Output,
    Overrides,
    Pictures,
    ProbeData,
    ProbeTest,
    RecipeFile,
    Tasks,
    import_strategies,
)


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
        except Exception as error:
            # Help and wrong usage leave by exceptions too, mostly before layerfuse is imported:
            # none of these is an error of its own, and they are not to wait for its import.
            if "layerfuse.errors" not in sys.modules:
                raise
            from layerfuse.errors import LayerfuseError

            if ctx.params["debug"] or not isinstance(error, LayerfuseError):
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
        typer.echo(f"layerfuse {version_of('layerfuse')}")
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

    import_strategies(imports)
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

    import_strategies(imports)
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


# Here for their place in the list of verbs.
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("guidance")(guidance)
app.command("redraw")(redraw)


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None, imports: Imports = None) -> None:
    """Resolve a recipe and print its parameters, tokens, steps and FLOPs, without any weights."""
    with _no_garbage_collection():
        from layerfuse.cost.recipe_table import show
        from layerfuse.evaluate.planning import planned

        import_strategies(imports)
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
    image_aspect_ratio: AspectRatio = None,
    seed: Annotated[int, Option(help="Seed of the sample of tokens.", min=0)] = 0,
    cached: Annotated[
        bool,
        Option("--cached", help="Keep features of all layers in the cache, and read them there."),
    ] = False,
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
        image_aspect_ratio=image_aspect_ratio,
        seed=seed,
        cached=cached,
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
    image_aspect_ratio: AspectRatio = None,
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
        image_aspect_ratio=image_aspect_ratio,
        seed=seed,
        output=output,
    )


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
    image_aspect_ratio: AspectRatio = None,
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
        image_aspect_ratio=image_aspect_ratio,
        output=output,
    )


listing.command("suites")(list_suites)
listing.command("benchmarks")(list_benchmarks)


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

        import_strategies(imports)
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
    from layerfuse.evaluate.load_answerer import ask_model

    import_strategies(imports)
    typer.echo(ask_model(model, image, question, max_new_tokens))


app.command()(inspect)
app.command()(demo)


@app.command()
def export(
    model: ModelFolder,
    to: Annotated[
        Literal["llava", "hub", "gguf"],
        Option(
            help="llava: transformers' own LLaVA; hub: a folder that brings its own code; gguf: an "
            "image encoder for llama.cpp."
        ),
    ],
    output: Annotated[
        Path | None, Option(help="A new folder.", show_default="<model>-<to>")
    ] = None,
    class_token_first: Annotated[
        bool,
        Option(
            "--class-token-first",
            help="gguf: write an encoder with a class token (CLIP) for a llama.cpp that puts it "
            "before the patches; releases since May 2025 do not, and would answer worse.",
        ),
    ] = False,
    imports: Imports = None,
) -> None:
    """Write a trained model for other programs, checked to compute the same."""
    from layerfuse.export.formats import export

    import_strategies(imports)
    exported = export(model, to, output, class_token_first=class_token_first)
    typer.echo(
        f"{exported.folder}: the largest difference of {exported.compared} is "
        f"{exported.difference:.2g}"
    )
    for note in exported.notes:
        typer.echo(note)


@app.command("import")
def import_release(
    checkpoint: Annotated[
        str, Argument(help="Its folder; for llava-hf a hub id too.", show_default=False)
    ],
    layout: Annotated[
        Literal[
            "llava-1.5",
            "mmfuser",
            "dense-connector",
            "layer-select-fuse",
            "igva",
            "tgif",
            "llava-hf",
        ],
        Option("--from", help="Whose code wrote it; llava-hf is transformers' own LLaVA."),
    ],
    output: Annotated[Path, Option(help="A new folder.")],
    encoder: Annotated[
        str | None,
        Option(help="Hub id or folder of the encoder.", show_default="what the checkpoint names"),
    ] = None,
    base: Annotated[
        str | None,
        Option(help="The LLM that a projector alone or a LoRA adapter was trained with."),
    ] = None,
    sentence_encoder: Annotated[
        str | None,
        Option(help="Of igva: the sentence encoder.", show_default="what the checkpoint names"),
    ] = None,
    chat_template: Annotated[
        Path | None,
        Option(
            help="A Jinja template of messages.",
            show_default="the tokenizer's own, or LLaVA-1.5's for llama",
        ),
    ] = None,
) -> None:
    """Read a released checkpoint, of layerfuse's papers or of LLaVA, as a model of layerfuse."""
    from layerfuse.errors import LayerfuseError
    from layerfuse.released.importing import Elsewhere, described, import_checkpoint

    template = None
    if chat_template is not None:
        try:
            template = chat_template.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise LayerfuseError(f"cannot read {chat_template}: {error}") from error
    elsewhere = Elsewhere(encoder, base, sentence_encoder, template)
    for line in described(import_checkpoint(checkpoint, layout, output, elsewhere)):
        typer.echo(line)
    typer.echo(f"imported: {output}")


@app.command()
def push(
    folder: Annotated[Path, Argument(help="A folder that `layerfuse export` wrote.")],
    repository: Annotated[str, Argument(help="Its name on the hub: user/name.")],
    public: Annotated[bool, Option("--public", help="A new repository is for all to see.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="List what would be uploaded, and do nothing.")
    ] = False,
) -> None:
    """Upload an exported model to the Hugging Face hub."""
    from layerfuse.export.push import push

    for line in push(folder, repository, private=not public, dry_run=dry_run):
        typer.echo(line)


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
