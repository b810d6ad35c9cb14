"""The command line: one verb per command, no logic, and nothing heavy imported until a verb runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pennyweight.allocator import start_again_tuned
from pennyweight.cli import verbs
from pennyweight.cli.adapters import adapters
from pennyweight.cli.app import app
from pennyweight.cli.ending import run_command

__all__ = ["app", "main", "verbs"]

app.add_typer(adapters)

# Verbs that train on this machine, and the one that says what that will take.
_TRAINING = ("train", "compare", "compare-part", "quickstart", "plan")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    from typer.main import get_command

    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if arguments is None and given[0] in _TRAINING:
        start_again_tuned()

    def command(arguments: Sequence[str]) -> object:
        parsed = get_command(app)
        return parsed.main(list(arguments), prog_name="pennyweight", standalone_mode=False)

    sys.exit(run_command(command, given))
