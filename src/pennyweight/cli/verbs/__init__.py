"""The verbs, in the order of `--help`. Each parses its arguments, calls one function, and hands the
answer to the printer."""

from pennyweight.cli.verbs import describing, training, tuned, serving, around  # isort: skip

__all__ = ["around", "describing", "serving", "training", "tuned"]
