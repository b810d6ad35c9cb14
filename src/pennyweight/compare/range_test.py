"""The learning-rate range test of one arm: short runs up a geometric grid (Smith 2015, section 3.3,
with a fresh start for every rate), judged by loss on training rows that are set apart.

The held-out rows that arms are compared on are never read here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pennyweight.config import RunConfig
from pennyweight.data.batch import collate
from pennyweight.data.conversation import Example
from pennyweight.data.examples import Examples
from pennyweight.errors import DataError, DivergedError
from pennyweight.evaluate import LossReport, bootstrap, evaluate_loss, in_batches, read_by
from pennyweight.finetune.learner import micro_batches, trainee, what_learns
from pennyweight.lora import attached, detach
from pennyweight.model import BaseModel, load_base
from pennyweight.runs import adapter_slot
from pennyweight.train import Recompute, Step, enable_checkpointing, train

__all__ = ["RangeTest", "best_rate", "grid", "set_apart", "shortened"]

BEYOND = 3  # rates tried past an end of the grid while the best is that end


def grid(low: float, high: float, points: int) -> list[float]:
    """`points` rates from `low` to `high`, each the same factor above the last, to 3 digits."""
    factor = (high / low) ** (1 / (points - 1))
    return [_three_digits(low * factor**i) for i in range(points)]


def shortened(config: RunConfig, steps: int) -> RunConfig:
    """The run with its schedule over `steps` steps, warm-up in the same proportion."""
    train = config.train
    share = train.warmup_ratio
    if train.warmup_steps is not None and train.max_steps is not None:
        share = train.warmup_steps / train.max_steps
    short = {"max_steps": steps, "warmup_steps": min(steps - 1, round(share * steps))}
    return config.model_copy(update={"train": train.model_copy(update=short)})


def set_apart(train: Examples, rows: int) -> tuple[Examples, Examples]:
    """About `rows` examples to judge by, at most a fifth of all, and the others to train on.

    Examples that ask the same are on one side; which side is a hash of the question alone.
    """
    questions = [_question(example) for example in train]
    if len(set(questions)) == 1:
        questions = [example.ids.tobytes() for example in train]
    sizes: dict[bytes, int] = {}
    for question in questions:
        sizes[question] = sizes.get(question, 0) + 1
    wanted, chosen, taken = max(1, min(rows, len(questions) // 5)), set[bytes](), 0
    for question in sorted(sizes, key=lambda each: hashlib.sha256(each).digest()):
        if taken < wanted and taken + sizes[question] < len(questions):
            chosen.add(question)
            taken += sizes[question]
    if not chosen:
        raise DataError(
            f"data.train: {len(questions)} rows are too few to set some apart for a range test; "
            "give compare.learning_rates"
        )
    apart = [i for i, question in enumerate(questions) if question in chosen]
    rest = [i for i, question in enumerate(questions) if question not in chosen]
    return train.subset(apart), train.subset(rest)


def best_rate(points: Sequence[Mapping[str, Any]]) -> int | None:
    """The place of the best stable rate: lowest loss, or a smaller rate whose loss is not
    measurably higher (paired 95 % interval over the rows). None where no rate was stable."""
    stable = [i for i, point in enumerate(points) if point["stable"]]
    if not stable:
        return None
    best = min(stable, key=lambda i: points[i]["loss"])
    for i in stable:
        if i == best:
            break
        changes = np.subtract(points[i]["document_losses"], points[best]["document_losses"])
        between = bootstrap(changes.tolist(), points[best]["document_counts"])
        if between is not None and between[0] <= 0:
            return i
    return best


class RangeTest:
    """One arm's base and rows, resident; `tried(rate)` is a short run from a fresh start."""

    def __init__(
        self, config: RunConfig, train: Examples, rows: int, *, recompute: Recompute
    ) -> None:
        self.config, self.recompute = config, recompute
        self.judged, self.rest = set_apart(train, rows)
        self.base = self._fresh_base()
        self.before = self._report(None)

    def tried(self, rate: float) -> dict[str, Any]:
        """Loss after a short run at this rate. It is stable where every loss was finite and the
        loss on the rows set apart came down."""
        changed = {"learning_rate": rate}
        config = self.config.model_copy(
            update={"train": self.config.train.model_copy(update=changed)}
        )
        try:
            steps = self._trained(config)
            after = self._report(adapter_slot(config))
        except DivergedError as diverged:
            return {"learning_rate": rate, "stable": False, "loss": None, "why": str(diverged)}
        finally:
            self._start_over()
        came_down = after.loss < self.before.loss
        return {
            "learning_rate": rate,
            "stable": came_down and not any(step.skipped for step in steps),
            "loss": after.loss,
            "why": "" if came_down else "the loss did not come down",
            "document_losses": after.document_losses,
            "document_counts": after.document_counts,
        }

    def _trained(self, config: RunConfig) -> list[Step]:
        assert config.train.max_steps is not None, "shortened() sets it"
        slot = adapter_slot(config)
        learner = trainee(self.base, config, what_learns(self.base, config), config.train.max_steps)
        return list(
            train(
                learner,
                lambda epoch: micro_batches(config, self.rest.lengths, epoch),
                lambda indices: collate([self.rest[i] for i in indices], slot),
                total_steps=config.train.max_steps,
                accumulation=config.train.gradient_accumulation_steps,
            )
        )

    def _start_over(self) -> None:
        if "default" in attached(self.base):
            detach(self.base, "default")
        if self.config.train.method == "full":
            # A copy of every weight beside the optimizer's could be what no longer fits.
            del self.base
            self.base = self._fresh_base()

    def _fresh_base(self) -> BaseModel:
        base = load_base(self.config.base, trainable=self.config.train.method == "full")
        enable_checkpointing(base, self.recompute)
        return base

    def _report(self, adapter: str | None) -> LossReport:
        return evaluate_loss(self.base, read_by(in_batches(self.judged), adapter))


def walked(
    rates: Sequence[float], tried: Callable[[float], Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Points of the whole grid, and beyond an end of it for as long as the best is that end."""
    factor = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
    points = [tried(rate) for rate in rates]
    first = 0  # the place of points[0] on a grid that has no ends
    for _ in range(BEYOND):
        best = best_rate(points)
        above = rates[0] * factor ** (first + len(points))
        if best == len(points) - 1 and above < 10:
            points.append(tried(_three_digits(above)))
        elif best == 0 or best is None:
            first -= 1
            points.insert(0, tried(_three_digits(rates[0] * factor**first)))
        else:
            break
    return points


def _question(example: Example) -> bytes:
    """What stands before the first trained token; the whole row where that is nothing."""
    firsts = np.flatnonzero(example.trained)
    start = int(firsts[0]) if len(firsts) else 0
    return bytes(np.ascontiguousarray(example.ids[: start if start > 1 else None]).tobytes())


def _three_digits(value: float) -> float:
    return round(value, 2 - math.floor(math.log10(value)))
