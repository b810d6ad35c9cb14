"""A base and its adapters, served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pennyweight.cli import show
from pennyweight.cli.app import app
from pennyweight.cli.ending import not_begun

__all__ = ["serve"]


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="A YAML file with a server's settings.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A Hugging Face id, a folder, or builtin (the default).")
    ] = None,
    quantization: Annotated[
        Literal["none", "int8", "nf4", "fp4"] | None,
        typer.Option(help="How the base is held; default nf4."),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="A folder of adapters, each served by its folder's name.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at; 8000.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where jobs and adapters are kept; runs/serve.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="A file of keys, `NAME KEY` a line.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Address, base and key as JSON, once it listens.")
    ] = False,
) -> None:
    """Serve a base and its adapters over OpenAI's API, and train more beside them.

    Files, fine-tuning jobs, models, chat, usage. Needs the extra `serve`. The key is printed.
    """
    from pennyweight.serve import load_settings
    from pennyweight.serve import serve as run_server

    given = {
        "base.model": base,
        "base.quantization": quantization,
        "adapters": None if adapters is None else str(adapters),
        "host": host,
        "port": port,
        "data_dir": None if data_dir is None else str(data_dir),
        "keys": None if keys is None else str(keys),
    }
    with show.Printer(as_json) as printer, not_begun():
        settings = load_settings(config, {k: v for k, v in given.items() if v is not None})

        def told(about: dict[str, Any]) -> None:
            printer.give(about, lambda: "")

        run_server(settings, ready=told if as_json else None)
