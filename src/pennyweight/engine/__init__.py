"""The sole owner of a resident base, and the four verbs by which adapters train and answer on it."""

from pennyweight.engine.engine import Engine, Mode, Passed

__all__ = ["Engine", "Mode", "Passed"]
