"""The verb that serves a web page."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from layerfuse_cli.options import Imports, import_strategies

INTERRUPTED = 130
"""exit code of what Ctrl+C ended, as shells have it"""


def demo(
    models: Annotated[
        list[Path],
        Argument(help="Folders of one to four trained models: runs/<study>/arms/<arm>/model ..."),
    ],
    study: Annotated[
        Path | None,
        Option(help="Study whose report is shown.", show_default="that of the models"),
    ] = None,
    similarity: Annotated[
        Path | None,
        Option(
            help="Folder of `layerfuse similarity` to show.",
            show_default="the study's, where it has one",
        ),
    ] = None,
    host: Annotated[
        str, Option(help="Where the page is served. The default is this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, Option(help="Port of the page.", min=1, max=65535, show_default="a free one")
    ] = None,
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.", min=1)] = 64,
    imports: Imports = None,
) -> None:
    """Ask trained models about pictures on a web page, and see what their answers rest on."""
    # What is imported and loaded takes long enough to be regretted.
    try:
        _load_and_serve(
            models,
            study=study,
            similarity=similarity,
            host=host,
            port=port,
            max_new_tokens=max_new_tokens,
            imports=imports,
        )
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(INTERRUPTED) from interrupt


def _load_and_serve(
    models: list[Path],
    *,
    study: Path | None,
    similarity: Path | None,
    host: str,
    port: int | None,
    max_new_tokens: int,
    imports: list[str] | None,
) -> None:
    """What the verb does, until it is interrupted."""
    from rich.console import Console

    from layerfuse.explain.demo_content import load_content
    from layerfuse.explain.demo_launch import listening, require_gradio, serve_demo
    from layerfuse.progress import shown_progress

    require_gradio()
    import_strategies(imports)
    # Before the models, which may load for minutes.
    with listening(host, port) as bound:
        with shown_progress(Console()) as progress:
            content = load_content(
                models,
                study=study,
                similarity=similarity,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
        serve_demo(content, bound, host, typer.echo)
