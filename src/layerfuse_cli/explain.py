"""Verbs that look inside the answers of a trained model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from layerfuse_cli.options import Imports, ModelFolder, import_strategies


def inspect(
    model: ModelFolder,
    image: Annotated[Path, Argument(help="A picture.")],
    question: Annotated[str, Argument(help="The question.")],
    output: Annotated[
        Path | None,
        Option(help="Folder.", show_default="MODEL/inspection/<picture>-<question>"),
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
