"""How long a job takes here: its steps and its evaluations, at the speed this machine was measured at."""

from __future__ import annotations

import threading

from pennyweight.calibrate import calibrated, remembered
from pennyweight.config import BaseConfig, DataConfig, Method, RunConfig, TrainConfig
from pennyweight.data.prepare import Prepared
from pennyweight.plan import Device, Plan, named_device

__all__ = ["Pace", "evaluations", "job_seconds"]

# Of training on a token: forward alone, where backward takes twice that.
FORWARD_SHARE = 1 / 3
EVALUATIONS = 10  # on the way, where a job names no `eval_steps`


class Pace:
    """This machine's speed, measured in the background when somebody begins to describe a job.

    A processor is measured until it was idle meanwhile; of a card its stated speed is known.
    """

    def __init__(self, base: BaseConfig) -> None:
        method: Method = "lora" if base.quantization == "none" else "qlora"
        self._config = RunConfig(
            base=BaseConfig(device=base.device),
            data=DataConfig(train="builtin"),
            train=TrainConfig(method=method, max_steps=1),
        )
        self._lock = threading.Lock()
        self._known = threading.Event()
        self._device: Device | None = None
        self._measuring = False

    def measure(self) -> None:
        """Begin to, unless it is known; waits for nothing."""
        with self._lock:
            if self._measuring or (self._known.is_set() and remembered(self._config) is not None):
                return
            self._measuring = True
        # A daemon, for the server ends without it.
        threading.Thread(target=self._measure, name="pace", daemon=True).start()

    def device(self, patience_s: float) -> Device | None:
        """The device with its speed; None where that is not known within so long."""
        if not self._known.is_set():
            self.measure()
        self._known.wait(patience_s)
        return self._device

    def _measure(self) -> None:
        try:
            found = calibrated(named_device(self._config.base.device), self._config)
            self._device = None if found.kind == "cpu" and found.launch_s is None else found
        finally:
            self._known.set()
            self._measuring = False


def job_seconds(predicted: Plan, run: RunConfig, data: Prepared) -> float | None:
    """What a job takes from its first step to its last word, alone on the machine."""
    cost = predicted.cost
    if cost.seconds is None or cost.steps is None:
        return None
    held_out = float(sum(data.eval[: run.evaluate.max_rows].lengths))
    read = held_out * evaluations(cost.steps, run.train.eval_steps)
    return cost.seconds + FORWARD_SHARE * read / cost.tokens_a_second


def evaluations(steps: int, eval_steps: int | None) -> int:
    """Of the base before, after every so many steps and the last, and of what is kept in the end."""
    every = eval_steps or max(1, steps // EVALUATIONS)
    return 2 + steps // every + (steps % every > 0)
