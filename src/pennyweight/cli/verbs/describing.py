"""Before a run: its description written, translated, looked at, planned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pennyweight.cli import show
from pennyweight.cli.app import Json, Overrides, RunFile, app

__all__ = ["import_", "init", "parity", "plan", "preview"]


@app.command()
def init(
    model: Annotated[
        str, typer.Option(help="A Hugging Face id, a folder, or builtin.")
    ] = "builtin",
    data: Annotated[
        str, typer.Option(help="A file, a folder, a dataset id, or builtin.")
    ] = "builtin",
    method: Annotated[
        Literal["qlora", "lora", "full"], typer.Option(help="What is trained, on what base.")
    ] = "qlora",
    output_dir: Annotated[str, typer.Option(help="Where the run writes.")] = "runs/my",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Four adapters to begin with: two ranks, two rates.")
    ] = False,
    schema: Annotated[
        Path | None, typer.Option(help="Write the JSON Schema there, and name it for editors.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a commented run.yaml with the settings that matter."""
    from pennyweight.config import starter, write_schema

    with show.Printer(as_json) as printer:
        text = starter(model=model, data=data, method=method, output_dir=output_dir, sweep=sweep)
        if schema is not None:
            write_schema(schema)
            text = f"# yaml-language-server: $schema={schema.as_posix()}\n{text}"
        printer.give({"yaml": text}, lambda: text.rstrip("\n"))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The other tool's file.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the run's YAML goes; stdout without it.")
    ] = None,
    tool: Annotated[
        Literal["axolotl", "llama-factory", "trl", "peft"] | None,
        typer.Option("--from", help="Whose file it is; told by its keys without it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Translate another tool's configuration, with an account of every key.

    It reads axolotl's YAML, LLaMA-Factory's YAML, a configuration of TRL's sft, and PEFT's
    adapter_config.json.
    """
    from pennyweight.config.foreign import import_run, write_run

    with show.Printer(as_json) as printer:
        found = import_run(file, tool, beside=out.parent if out else None)
        if out is not None:
            write_run(found, out)
        answer = {**found.to_dict(), "out": str(out) if out else None}
        if not as_json:
            printer.aside(show.imported(found, file.name, out))
        printer.give(answer, lambda: "" if out else found.text.rstrip("\n"))


@app.command()
def preview(
    run: RunFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    row: Annotated[
        list[str] | None,
        typer.Option(help="A row to show, as file:line or line; again for more."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the ledger of all rows and its picture.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show rows as the model reads them, trained tokens in green.

    What was cut or dropped is counted below them. Ends as train would where it refuses the data.
    """
    from pennyweight.config import load_run

    with show.Printer(as_json) as printer:
        config = load_run(run, overrides or ()).config
        from pennyweight.errors import DataError
        from pennyweight.finetune import look

        seen = look(config, rows, named=row or (), out=out)
        printer.give(seen.to_dict(), lambda: show.preview(seen.shown, seen.lines))
        if seen.refusal:
            raise DataError.all(seen.refusal)


@app.command()
def plan(
    run: RunFile,
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help="A device by name: rtx4090, h200, cpu.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Memory to plan for, such as 24GB.")] = None,
    fit: Annotated[
        str | None, typer.Option(help="Find the largest run that fits, such as 24GB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict memory, time and disk before anything is loaded."""
    from pennyweight.calibrate import calibrated
    from pennyweight.config import load_run
    from pennyweight.plan import fit as find_fit
    from pennyweight.plan import named_device, parse_memory
    from pennyweight.plan import plan as predict

    with show.Printer(as_json) as printer:
        config = load_run(run, overrides or ()).config
        on = calibrated(named_device(device or config.base.device), config)
        if fit:
            found = find_fit(config, device=on, budget_bytes=parse_memory(fit))
            printer.give(show.plain_fields(found), lambda: show.facts(show.plain_fields(found)))
            return
        budget = parse_memory(memory) if memory else None
        if config.adapters.list or config.adapters.grid:
            from pennyweight.config import variants
            from pennyweight.sweep import sizes

            shared = config.adapters.mode == "fast"
            many = sizes(variants(config), shared=shared, device=on, budget_bytes=budget)
            printer.give(many.to_dict(), lambda: show.plan(many))
            return
        said = predict(config, device=on, budget_bytes=budget)
        printer.give(said.to_dict(), lambda: show.plan(said))


@app.command()
def parity(
    target: Annotated[
        Path, typer.Argument(metavar="RUN.YAML|RUN", help="A description, or a run's folder.")
    ],
    overrides: Overrides = None,
    merged: Annotated[
        Path | None, typer.Option(help="A merged folder; default the run's own, if there is one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove that training, chat, server and merged folder read a conversation as the same ids.

    Reads no weight. Every `train` begins with it.
    """
    with show.Printer(as_json) as printer:
        from pennyweight.finetune import parity as compare

        found = compare(target, overrides or (), merged=merged)
        printer.give(found.to_dict(), lambda: show.parity(found))
    raise typer.Exit(found.exit_code)
