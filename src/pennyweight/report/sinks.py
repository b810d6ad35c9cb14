"""Further places that metrics go to when asked: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pennyweight.errors import ConfigError

__all__ = ["Sink", "open_sinks"]


@runtime_checkable
class Sink(Protocol):
    """Somewhere that takes numbers by step."""

    def write(self, number: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sinks(names: Sequence[str], folder: str | os.PathLike[str]) -> tuple[Sink, ...]:
    """The sinks of `train.report_to`, for the run in this folder.

    Raises ConfigError naming the extra to install for each that is missing.
    """
    kinds: dict[str, Callable[[Path], Sink]]
    kinds = {"tensorboard": _TensorBoard, "wandb": _Wandb}
    faults = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            mend = f'`pip install "pennyweight[{name}]"`, or remove it from the list'
            faults.append(f"train.report_to: {name} is not installed: {mend}")
    if faults:
        raise ConfigError.all(faults)
    return tuple(kinds[name](Path(folder)) for name in names)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def write(self, number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path) -> None:
        wandb = importlib.import_module("wandb")
        # The same folder again is the same run again, so that a resumed curve goes on.
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pennyweight"),
            id=name,
            name=folder.name,
            dir=str(folder),
            resume="allow",
        )

    def write(self, number: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=number)

    def close(self) -> None:
        self._run.finish()
