"""The first story, the machine, and what settings mean."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pennyweight.cli import show
from pennyweight.cli.app import Json, app

__all__ = ["doctor", "explain", "quickstart", "schema"]


@app.command()
def quickstart(
    output_dir: Annotated[str, typer.Option(help="Where the run writes.")] = "runs/quickstart",
    as_json: Json = False,
) -> None:
    """Tell the whole story on the built-in model and task.

    It takes a few minutes on a CPU and needs no download.
    """
    from pennyweight.quickstart import quickstart as tell

    with show.Printer(as_json) as printer:
        figures = tell(output_dir, print)
        printer.give(figures, lambda: show.facts(figures))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look over this machine, one fix a line."""
    from pennyweight.doctor import doctor as look_over

    with show.Printer(as_json) as printer:
        found = look_over()
        answer: dict[str, Any] = {"ok": all(each.ok for each in found), "checks": found}
        printer.give(answer, lambda: show.checks(found))


@app.command()
def explain(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="Such as train.learning_rate.")] = "",
    as_json: Json = False,
) -> None:
    """Say what a setting does, takes, defaults to and needs."""
    from pennyweight.config import explain as say

    with show.Printer(as_json) as printer:
        text = say(key)
        printer.give({"key": key, "text": text}, lambda: text)


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of run.yaml, for editors."""
    import json

    from pennyweight.config import json_schema

    with show.Printer(as_json) as printer:
        printer.give(json_schema(), lambda: json.dumps(json_schema(), indent=2))
