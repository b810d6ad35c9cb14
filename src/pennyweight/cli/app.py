"""The command line's app, and the arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Json", "Overrides", "RunFile", "RunFolder", "app"]

app = typer.Typer(
    name="pennyweight",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run's description.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder a run wrote.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings in place of the file's."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


def _version(asked: bool) -> bool:
    if asked:
        from pennyweight import __version__

        print(__version__)
        raise typer.Exit
    return asked


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Fine-tune large language models with LoRA and QLoRA on modest machines."""
