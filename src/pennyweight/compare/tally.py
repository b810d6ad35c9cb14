"""From measured sums to figures with intervals. Two kinds, never mixed: over documents (would other
rows say the same of these very models?) and over seeds (would other trainings say the same?).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pennyweight.evaluate import Interval, bootstrap, student, wilson

__all__ = ["Figure", "answered", "forgotten", "kept", "loss"]

Documents = Mapping[str, Any]  # `losses` and `counts`, one each a document


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over seeds, the value of each seed, and both 95 % intervals.

    `documents`: the documents are drawn again, the same for everything that is compared.
    `seeds`: Student's t over the values of the seeds, None for one seed.
    """

    mean: float
    by_seed: tuple[float, ...]
    documents: Interval | None
    seeds: Interval | None


def loss(runs: Sequence[Documents]) -> Figure:
    """Nats a token, of one model a seed on the same documents."""
    sums = np.sum([run["losses"] for run in runs], axis=0)
    counts = np.sum([run["counts"] for run in runs], axis=0)
    return _figure(sums, counts, [sum(run["losses"]) / sum(run["counts"]) for run in runs])


def forgotten(before: Documents, after: Sequence[Documents]) -> Figure:
    """Nats a token that the loss rose on general text; above 0 is forgetting."""
    changes = [np.subtract(run["losses"], before["losses"]) for run in after]
    counts = np.asarray(before["counts"], dtype=np.float64)
    by_seed = [float(change.sum() / counts.sum()) for change in changes]
    return _figure(np.sum(changes, axis=0), counts * len(after), by_seed)


def kept(
    base: Documents, arm: Mapping[int, Documents], full: Mapping[int, Documents]
) -> Figure | None:
    """(base loss - arm loss) / (base loss - full loss), each by seed: 1 is all of what full
    fine-tuning gained. None where full fine-tuning did not measurably gain anything to keep."""
    seeds = [seed for seed in arm if seed in full]
    if not seeds:
        return None
    untuned = np.asarray(base["losses"], dtype=np.float64)
    gained = {seed: untuned - np.asarray(full[seed]["losses"]) for seed in seeds}
    ours = {seed: untuned - np.asarray(arm[seed]["losses"]) for seed in seeds}
    whole = np.sum([gained[seed] for seed in seeds], axis=0)
    certain = bootstrap(whole.tolist(), [float(count) for count in base["counts"]])
    if certain is None or certain[0] <= 0:
        return None
    by_seed = [float(ours[seed].sum() / gained[seed].sum()) for seed in seeds]
    mean = float(np.sum([ours[seed] for seed in seeds]) / whole.sum())
    between = bootstrap(np.sum([ours[seed] for seed in seeds], axis=0).tolist(), whole.tolist())
    return Figure(mean, tuple(by_seed), between, student(by_seed))


def answered(runs: Sequence[Mapping[str, Any] | None]) -> Figure | None:
    """Share of answers that are right; None where nothing was answered."""
    told = [run["right"] for run in runs if run is not None]
    if not told:
        return None
    sums = np.sum(told, axis=0)
    figure = _figure(
        sums, np.full(len(sums), float(len(told))), [math.fsum(run) / len(run) for run in told]
    )
    if len(told) == 1 or figure.mean in (0, 1):
        # Drawn again, answers that are all alike stay alike: that is no certainty.
        return replace(figure, documents=wilson(round(figure.mean * len(sums)), len(sums)))
    return figure


def over_seeds(values: Sequence[float]) -> Figure:
    """A figure that has no documents, such as an effective rank."""
    return Figure(math.fsum(values) / len(values), tuple(values), None, student(values))


def _figure(sums: Any, counts: Any, by_seed: Sequence[float]) -> Figure:
    between = bootstrap(sums.tolist(), [float(count) for count in counts])
    return Figure(float(sums.sum() / counts.sum()), tuple(by_seed), between, student(by_seed))
