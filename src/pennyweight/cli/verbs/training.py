"""A run, and the controlled experiment of several."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pennyweight.cli import show
from pennyweight.cli.app import Json, Overrides, RunFile, app
from pennyweight.cli.ending import not_begun

__all__ = ["compare", "compare_part", "train"]


@app.command()
def train(run: RunFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train; the same command again resumes.

    With `adapters:` in the file all it describes are trained, side by side over one base.
    """
    from pennyweight.config import load_run

    with show.Printer(as_json) as printer, not_begun():
        loaded = load_run(run, overrides or ())
        # After the description was found sound: what follows takes seconds to import.
        adapters = loaded.config.adapters
        if adapters.list or adapters.grid:
            from pennyweight.sweep import sweep

            found = sweep(loaded.config, origin=loaded.origin, text=loaded.text)
            printer.give(found.to_dict(), lambda: show.adapters(found))
            if found.exit_code:
                raise typer.Exit(found.exit_code)
            return
        from pennyweight.calibrate import remembered
        from pennyweight.finetune import finetune

        device = remembered(loaded.config)
        result = finetune(loaded.config, origin=loaded.origin, text=loaded.text, device=device)
        printer.give(result.to_dict(), lambda: show.facts(result.to_dict()))


@app.command()
def compare(
    run: RunFile,
    overrides: Overrides = None,
    arms: Annotated[str | None, typer.Option(help="Methods to compare: full,lora,qlora.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks to compare: 4,8,16,32,64.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, a run each: 0,1,2.")] = None,
    as_json: Json = False,
) -> None:
    """Train base, LoRA, QLoRA and full side by side: same rows, same tokens.

    One table with intervals; the same command again resumes.
    """
    from pennyweight.config import load_run

    with show.Printer(as_json) as printer:
        lists = {"compare.arms": arms, "compare.ranks": ranks, "compare.seeds": seeds}
        given = [f"{key}=[{value}]" for key, value in lists.items() if value is not None]
        loaded = load_run(run, [*(overrides or ()), *given])
        from pennyweight.compare import compare as side_by_side

        found = side_by_side(loaded.config, origin=loaded.origin)
        printer.give(found.to_dict(), lambda: show.comparison(found))


@app.command("compare-part", hidden=True)
def compare_part(
    name: Annotated[str, typer.Argument(help="Which part; its job is JSON on stdin.")],
    as_json: Json = False,
) -> None:
    """One part of a comparison, in a process of its own."""
    import json

    from pennyweight.compare import run_part

    with show.Printer(as_json) as printer:
        answer = run_part(name, json.load(sys.stdin))
        printer.give(answer, lambda: show.facts(answer))
