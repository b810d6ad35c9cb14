"""Base against tuned on the held-out rows: losses and answers, with the difference and its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.config import EvaluateConfig, RunConfig
from pennyweight.errors import DataError
from pennyweight.evaluate import (
    AnswerReport,
    LossReport,
    evaluate_answers,
    evaluate_loss,
    in_batches,
    paired,
    paired_answers,
    read_by,
)
from pennyweight.generate import Request
from pennyweight.model import BaseModel
from pennyweight.runs.folder import HeldOut, RunFolder, adapter_slot

__all__ = ["Measured", "evaluate_run", "measure"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on the held-out rows."""

    losses: LossReport
    answers: AnswerReport | None

    def to_dict(self) -> dict[str, Any]:
        return self.losses.to_dict() | (self.answers.to_dict() if self.answers else {})


def evaluate_run(
    folder: Path | str, *, max_rows: int | None = None, generate_rows: int | None = None
) -> dict[str, Any]:
    """Measure the base and what the run made of it, on the rows kept beside it.

    Gives `base`, `tuned` (each with its figures and 95 % intervals), `loss_difference` and, where
    answers were generated, `answers_difference` (a paired difference of the share that is right).
    """
    run = RunFolder(Path(folder))
    config, held = run.config(), run.read_held_out()
    settings = config.evaluate
    settings = settings.model_copy(
        update={
            "max_rows": settings.max_rows if max_rows is None else max_rows,
            "generate_rows": settings.generate_rows if generate_rows is None else generate_rows,
        }
    )
    if not len(held.rows):
        raise DataError(
            f"{run.path}: the run held no rows out; give data.eval or data.eval_fraction and train"
        )
    before, after = _both(run, config, held, settings)
    answer: dict[str, Any] = {
        "base": before.to_dict(),
        "tuned": after.to_dict(),
        "loss_difference": paired(before.losses, after.losses).to_dict(),
    }
    if before.answers is not None and after.answers is not None:
        answer["answers_difference"] = paired_answers(before.answers, after.answers).to_dict()
    return answer


def measure(
    base: BaseModel,
    held: HeldOut,
    settings: EvaluateConfig,
    *,
    adapter: str | None,
    stop_ids: tuple[int, ...],
) -> Measured:
    """Losses of the held-out rows, and answers to as many questions as `settings` says; `stop_ids`
    end an answer beside the model's own."""
    rows = [held.rows[i] for i in range(min(len(held.rows), settings.max_rows))]
    losses = evaluate_loss(base, read_by(in_batches(rows), adapter))
    questions = held.questions[: settings.generate_rows]
    room = base.max_positions
    asked = [q for q in questions if len(q.prompt_ids) < room]
    if not asked:
        return Measured(losses, None)
    requests = [
        Request(
            prompt_ids=q.prompt_ids,
            max_new_tokens=min(settings.max_new_tokens, room - len(q.prompt_ids)),
            stop_ids=tuple(dict.fromkeys([*stop_ids, *base.stop_ids])),
            adapter=adapter,
        )
        for q in asked
    ]
    references = [q.reference for q in asked]
    return Measured(
        losses, evaluate_answers(base, requests, references, is_correct=_check_of(held))
    )


def _both(
    run: RunFolder, config: RunConfig, held: HeldOut, settings: EvaluateConfig
) -> tuple[Measured, Measured]:
    """The base and the tuned model; one resident base serves both where there is an adapter."""
    _, tuned = run.open()
    slot, stop_ids = adapter_slot(config), run.renderer(tuned.tokenizer).stop_ids
    after = measure(tuned, held, settings, adapter=slot, stop_ids=stop_ids)
    base = tuned if slot is not None else run.open(adapter=False)[1]
    return measure(base, held, settings, adapter=None, stop_ids=stop_ids), after


def _check_of(held: HeldOut) -> Callable[[str, str], bool] | None:
    if not held.builtin_task:
        return None
    from pennyweight.builtin.task import is_correct

    return is_correct
