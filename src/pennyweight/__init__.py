"""Affordable fine-tuning of large language models with LoRA and QLoRA.

    base = pennyweight.load_base(pennyweight.BaseConfig(model="builtin"))
    pennyweight.attach(base, pennyweight.LoraConfig(r=8), name="mine")

The names below are imported when first used, so that `import pennyweight` costs nothing. Three of
them (`generate`, `merge`, `train`) are functions that share their name with the room they come
from; `from pennyweight.merge import MergeReport` still finds the room.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.config import BaseConfig, LoraConfig, RunConfig, load_run
    from pennyweight.finetune import finetune as train
    from pennyweight.generate import Completion, Request, generate
    from pennyweight.lora import Adapter, attach, detach
    from pennyweight.merge import merge
    from pennyweight.model import load_base
    from pennyweight.runs import evaluate_run, open_chat

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "BaseConfig",
    "Completion",
    "LoraConfig",
    "Request",
    "RunConfig",
    "attach",
    "detach",
    "evaluate_run",
    "generate",
    "load_base",
    "load_run",
    "merge",
    "open_chat",
    "train",
]

_ROOMS = {
    "config": ("BaseConfig", "LoraConfig", "RunConfig", "load_run"),
    "generate": ("Completion", "Request", "generate"),
    "lora": ("Adapter", "attach", "detach"),
    "merge": ("merge",),
    "model": ("load_base",),
    "runs": ("evaluate_run", "open_chat"),
}
_PLACES = {name: (room, name) for room, names in _ROOMS.items() for name in names}
_PLACES["train"] = ("finetune", "finetune")


class _Face(ModuleType):
    """This package: importing a room does not hide the function of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'pennyweight' has no attribute {name!r}")
    room, there = _PLACES[name]
    return getattr(import_module(f"pennyweight.{room}"), there)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
