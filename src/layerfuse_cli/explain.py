"""Verbs that look inside trained models, and draw again what was measured."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from typer import Argument, Option

from layerfuse_cli.options import Imports, ModelFolder, import_strategies, is_given


def inspect(
    context: typer.Context,
    model: ModelFolder,
    image: Annotated[Path, Argument(help="A picture.")],
    question: Annotated[str, Argument(help="The question.")],
    output: Annotated[
        Path | None,
        Option(help="Folder.", show_default="MODEL/inspection/<picture>-<question>-<hash>"),
    ] = None,
    data: Annotated[
        str | None,
        Option(
            help="Pictures whose mean stands in for each layer that is taken away: a folder, a "
            "LLaVA JSON or a dataset.",
            show_default="the means that the model stores, or those of this picture",
        ),
    ] = None,
    split: Annotated[str, Option(help="Split of a dataset.")] = "train",
    limit: Annotated[int | None, Option(help="Use the first pictures of --data.", min=1)] = None,
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.", min=1)] = 64,
    imports: Imports = None,
) -> None:
    """Figures and a page of one answer: where it looked, and what each layer gave to it."""
    from layerfuse.explain.inspect import default_folder, inspect_answer
    from layerfuse.progress import shown_progress

    import_strategies(imports)
    for name in ("split", "limit"):
        if data is None and is_given(context, name):
            from layerfuse.errors import LayerfuseError

            raise LayerfuseError(f"--{name} is of --data, which is not given: leave it out")
    folder = output or default_folder(model, image, question)
    with shown_progress(Console(stderr=True)) as progress:
        inspection = inspect_answer(
            model,
            image,
            question,
            folder,
            data=data,
            split=split,
            limit=limit,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    typer.echo(inspection.facts.answer)
    typer.echo(f"{folder / 'inspect.html'}", err=True)


def guidance(
    context: typer.Context,
    model: ModelFolder,
    data: Annotated[
        str, Argument(help="A LLaVA JSON file, a folder of images, or a Hugging Face dataset.")
    ],
    split: Annotated[str, Option(help="Split of a dataset.")] = "test",
    limit: Annotated[int | None, Option(help="Use only the first samples.", min=1)] = None,
    column: Annotated[
        list[str] | None,
        Option(help="What the data calls a column, as image=imgs; repeatable."),
    ] = None,
    ignore_column: Annotated[
        list[str] | None, Option(help="A column to leave out on purpose; repeatable.")
    ] = None,
    literal_answers: Annotated[
        bool, Option("--literal-answers", help="Markers such as <image> in answers are text.")
    ] = False,
    batch_size: Annotated[int, Option(help="Questions answered at once.", min=1)] = 32,
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.", min=1)] = 16,
    cached: Annotated[
        bool, Option("--cached", help="Keep pictures' features in the cache, and read them.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        Option(help="Arithmetic of the model.", show_default="as it was saved"),
    ] = None,
    seed: Annotated[int, Option(help="Seed of resamples and shufflings.", min=0)] = 0,
    output: Annotated[
        Path | None, Option(help="Results folder.", show_default="MODEL/guidance")
    ] = None,
    imports: Imports = None,
) -> None:
    """Does the instruction of a guided model matter? Its weights, and answers without guidance."""
    from layerfuse.evaluate.evaluation import data_of
    from layerfuse.explain.guidance import guidance as measure_guidance
    from layerfuse.recipe.evaluate_settings import Evaluation

    import_strategies(imports)
    if is_given(context, "split") and Path(data).is_file():
        from layerfuse.errors import LayerfuseError

        raise LayerfuseError(f"--split is of a dataset, and {data} is a file: leave it out")
    asked = data_of(
        data,
        split,
        limit,
        columns=tuple(column or ()),
        ignore_columns=tuple(ignore_column or ()),
        literal_answers=literal_answers,
    )
    evaluation = Evaluation(data=asked, batch_size=batch_size, max_new_tokens=max_new_tokens)
    measure_guidance(model, evaluation, output=output, cached=cached, dtype=dtype, seed=seed)


def redraw(
    folder: Annotated[
        Path,
        Argument(
            help="Of a study, a look, a comparison, an inspection or an analysis of guidance."
        ),
    ],
    output: Annotated[
        Path | None,
        Option(help="Folder of the figures alone.", show_default="where they were"),
    ] = None,
) -> None:
    """Make the figures and pages of a folder again from its JSON, without any model."""
    from layerfuse.explain.redraw import redraw as redraw_folder

    for file in redraw_folder(folder, output):
        typer.echo(file)
