"""One run under way: what learns, where it stands, what was best, and what it came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pennyweight.config import RunConfig
from pennyweight.data.batch import Batch, collate
from pennyweight.data.examples import Examples
from pennyweight.data.prepare import Prepared
from pennyweight.errors import DiskError, Interrupted
from pennyweight.evaluate import LossReport, in_batches, loss_by_batch, paired, read_by
from pennyweight.finetune.beat import Beat, Beats, at_once
from pennyweight.finetune.learner import micro_batches, trainee, warmup_steps, what_learns
from pennyweight.finetune.result import RunResult
from pennyweight.finetune.shaping import shaping
from pennyweight.finetune.tally import Tally
from pennyweight.lora import detach
from pennyweight.model import BaseModel
from pennyweight.plan import DataSize, Plan
from pennyweight.report import Report, plot_losses, read_events
from pennyweight.runs import Outcome, RunFolder, adapter_slot, receipt_of, versions
from pennyweight.runs.parity import Parity
from pennyweight.train import (
    CheckpointState,
    Step,
    StopRequest,
    glimpse,
    load_latest,
    load_step,
    peak_memory_bytes,
    planned_steps,
    random_tensors,
    release_cached,
    require_same,
    restore_random,
    retire,
    save,
)

__all__ = ["EVALUATION_TOKENS", "Run", "data_size", "day_of", "stop_id"]

# Tokens evaluated at once, as long as memory does.
EVALUATION_TOKENS = 4096


class Run:
    """One run under way: what learns, where it stands, what was best."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        base: BaseModel,
        data: Prepared,
        stop: StopRequest,
        predicted: Plan,
        *,
        name: str = "default",
        alone: bool = True,
    ) -> None:
        """`name`: the adapter's among those of the base. `alone`: base and process are this run's
        own, so the process's random states are part of what it saves and takes up."""
        self.config, self.folder, self.base, self.data = config, folder, base, data
        self.stop = stop
        self.slot = adapter_slot(config, name)
        self.random = None if alone else random_tensors()
        self.parameters: dict[str, nn.Parameter] = {}
        self.total_steps = config.train.max_steps or planned_steps(
            self.micro_batches,
            epochs=config.train.epochs,
            accumulation=config.train.gradient_accumulation_steps,
        )
        self.eval_every = config.train.eval_steps or max(1, self.total_steps // 10)
        self.save_every = config.train.save_steps or self.eval_every
        self.best_step, self.best_loss, self.misses = 0, math.inf, 0
        self.tally = Tally()
        self.seconds_to_first_step = 0.0
        self.evaluation_tokens = EVALUATION_TOKENS
        self.stopped_early = False
        self.owes_evaluation = False  # of the step just taken
        self.saved: tuple[int, bool] | None = None  # the step last saved, and what it owed
        self.notices: list[str] = []
        label = "" if alone else name
        self.report = Report(folder.path, sinks=config.train.report_to, label=label)
        try:
            self.parameters = what_learns(base, config, name)
            self.trainee = trainee(base, config, self.parameters, self.total_steps, predicted)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the adapter off the base again, and close the log."""
        if self.slot is not None and self.parameters:
            detach(self.base, self.slot)
            self.parameters = {}
        self.report.close()

    def micro_batches(self, epoch: int) -> list[tuple[int, ...]]:
        """The epoch's micro-batches as indices of examples; a pure function of seed and epoch."""
        return micro_batches(self.config, self.data.train.lengths, epoch)

    @property
    def held_out_rows(self) -> Examples:
        """The rows that evaluations of the run measure."""
        return self.data.eval[: self.config.evaluate.max_rows]

    def collated(self, indices: Sequence[int]) -> Batch:
        return collate([self.data.train[i] for i in indices], self.slot)

    def resume(self) -> int | None:
        """Take up the newest whole checkpoint, if there is one of this very run; gives its step.

        None where there is none, or where it is of step 0.
        """
        found = load_latest(self.folder.checkpoints)
        if found is None:
            self.report.begin()
            return None
        state, passed_over = found
        if state.step or passed_over:
            require_same(state.identity, self.identity())
        if state.step == 0:  # nothing was learned yet: begin anew
            self.report.begin()
        else:
            self._restore(state)
        for why in passed_over:
            self.notice(f"passed over a checkpoint that is not whole: {why}")
        return state.step or None

    def _restore(self, state: CheckpointState) -> None:
        self.trainee.restore(state.tensors, state.progress)
        if self.random is None:
            restore_random(state.tensors)
        else:
            self.random = {n: t for n, t in state.tensors.items() if n.startswith("random/")}
        own = state.progress["run"]
        self.best_step, self.best_loss = own["best_step"], own["best_loss"] or math.inf
        self.misses, self.stopped_early = own["misses"], own["stopped_early"]
        self.tally = Tally.from_dict(own["tally"])
        if state.step < self.total_steps:
            self.tally.resumed_after.append(state.step)
        self.notices, self.owes_evaluation = own["notices"], own["owes_evaluation"]
        self.report.resume(own["events_offset"])
        for name, number in versions().items():
            if (before := state.progress["versions"].get(name)) != number:
                self.notice(f"resumed with {name} {number}, so far it was {before}")

    def tell_parity(self, agreed: Parity) -> None:
        """Say what the comparison of token ids came to."""
        self.report.event("parity", **agreed.to_dict())
        for line in (agreed.sentence(), *agreed.notes):
            self.report.say(line)

    def introduce(self, predicted: Plan, resumed: int | None) -> Beats[None]:
        """Say what is about to happen, and measure the base before anything is learned."""
        for line in self.data.ledger.lines():
            self.report.say(line)
        self.report.say(predicted.sentence())
        if resumed is not None:
            self.report.say(f"resumed after step {resumed} of {self.total_steps}")
            return
        self.report.event(
            "start",
            versions=versions(),
            data=self.data.ledger.summary(),
            planned_peak_bytes=predicted.counted_peak_bytes,
        )
        self.tally.before = yield from self._loss_report(None)
        if self.tally.before is not None:
            self.report.evaluation(0, self.tally.before.loss)

    def give_back(self) -> None:
        """Between training and evaluating: what one freed on a CPU would stand beside what the other
        takes. On a card it is taken up again."""
        if self.base.device.type == "cpu":
            release_cached(self.base.device)

    def evaluate_within(self, limit_tokens: int) -> None:
        """Memory did not do for an evaluation batch, but for so many tokens."""
        self.evaluation_tokens = limit_tokens
        self.notice(
            "out of memory evaluating; held-out rows go in batches of at most "
            f"{limit_tokens:,} tokens from here on"
        )

    def begin(self, seconds: float) -> None:
        """Say how long it took to get here; the first step comes next."""
        self.seconds_to_first_step = seconds
        self.report.event("first_step", seconds=seconds)
        self.report.say(f"first step after {seconds:.1f} s")

    def after(self, step: Step) -> Beats[None]:
        """What follows an optimizer step: report, evaluate, checkpoint."""
        self.tally.add(seconds=step.seconds, tokens=step.tokens)
        self.report.step(step, total_steps=self.total_steps, every=self.config.train.logging_steps)
        for notice in step.notices:
            self.notice(notice)
        last = step.number == self.total_steps
        self.owes_evaluation = step.number % self.eval_every == 0 or last
        yield Beat("stepped", step=step)
        yield from self.settle()
        if (step.number % self.save_every == 0 or last) and self.save():
            yield Beat("saved")

    def settle(self) -> Beats[None]:
        """Make the evaluation that is due, and save what came of it. A stop request leaves it due:
        the checkpoint says so, and the resumed run begins with it.
        """
        if not self.owes_evaluation:
            return
        measuring = self._loss_report(self.slot)
        try:
            found = yield from at_once(
                self.stop, measuring, "the evaluation is made when the run resumes"
            )
        except Interrupted:
            return
        self.owes_evaluation = False
        if found is not None and self._judge(found.loss) and self.save():
            yield Beat("saved")

    def save(self) -> bool:
        """A checkpoint of this instant, if there is none yet; older ones make room. Whether it was
        written."""
        if self.saved == (self.trainee.step, self.owes_evaluation):
            return False
        self.tally.saw(peak_memory_bytes(self.base.device))
        own = {
            "best_step": self.best_step,
            "best_loss": self.best_loss if self.best_step else None,
            "misses": self.misses,
            "tally": self.tally.to_dict(),
            "stopped_early": self.stopped_early,
            "owes_evaluation": self.owes_evaluation,
            "day": self.data.renderer.settings["day"],
            "notices": self.notices,
            "events_offset": self.report.offset,
        }
        state = CheckpointState(
            step=self.trainee.step,
            tensors=self.trainee.tensors() | (self.random or random_tensors()),
            progress=self.trainee.progress() | {"run": own, "versions": versions()},
            identity=self.identity(),
        )
        save(self.folder.checkpoints, state)
        self.saved = (self.trainee.step, self.owes_evaluation)
        retire(self.folder.checkpoints, self.config.train.save_total_limit, self.best_step)
        return True

    def finish(
        self, predicted: Plan, resumed: int | None, origin: Mapping[str, str]
    ) -> Beats[RunResult]:
        """Write the best weights out, with the receipt, the card and the picture.

        `origin`: where each setting's value comes from, for the receipt.
        """
        steps, trained_tokens = self.trainee.step, self.trainee.trained_tokens_seen
        if self.best_step and self.best_step != self.trainee.step:
            self._take_up_best()
        before, after = self.tally.before, (yield from self._loss_report(self.slot))
        change = paired(before, after) if before is not None and after is not None else None
        # A finished run that is looked at again has trained nothing; its peak is the earlier one.
        if resumed != self.total_steps:
            self.tally.saw(peak_memory_bytes(self.base.device))
        result = RunResult(
            output_dir=str(self.folder.path),
            steps=steps,
            best_step=self.best_step or steps,
            trained_tokens=trained_tokens,
            train_seconds=self.tally.seconds,
            seconds_to_first_step=self.seconds_to_first_step,
            loss_before=None if before is None else before.loss,
            loss_after=None if after is None else after.loss,
            loss_change=None if change is None else change.to_dict(),
            peak_memory_bytes=self.tally.peak_bytes,
            planned_peak_bytes=predicted.counted_peak_bytes,
            trained_parameters=sum(p.numel() for p in self.parameters.values()),
            resumed_from=resumed,
            notices=tuple(self.notices),
        )
        outcome = Outcome(
            result.to_dict(),
            self.tally.tokens,
            tuple(self.tally.resumed_after),
            self._became(predicted),
            before,
            after,
            change,
        )
        self.folder.keep_weights(
            self.base,
            self.config,
            receipt_of(self.config, origin, self.base, self.data, predicted, outcome),
            name=self.slot,
        )
        self.report.event("finished", **result.to_dict())
        try:
            absent = plot_losses(read_events(self.folder.events), self.folder.picture)
        except OSError as fault:
            absent = f"no loss plot: {self.folder.picture}: {fault.strerror}"
        if absent:
            self.report.say(absent)
        return result

    def identity(self) -> dict[str, str]:
        """What a checkpoint must share with the run that takes it up."""
        parts = {"base": self.base.fingerprint}
        parts |= {f"data, {name}": digest for name, digest in self.data.made_of.items()}
        return parts | shaping(self.config)

    def notice(self, text: str) -> None:
        self.notices.append(text)
        self.report.event("notice", text=text)
        self.report.say(text)

    def _take_up_best(self) -> None:
        try:
            best = load_step(self.folder.checkpoints, self.best_step)
        except DiskError as fault:
            self.notice(
                f"step {self.best_step} was best on the held-out rows, but its weights cannot be "
                f"read back, so those of the last step are kept: {fault}"
            )
            self.best_step = 0
            return
        self.notice(f"step {self.best_step} was best on the held-out rows; its weights are kept")
        self.trainee.restore(best.tensors, best.progress)

    def _judge(self, loss: float) -> bool:
        """Log the held-out loss of the step just taken; whether a checkpoint must hold what followed."""
        number = self.trainee.step
        self.report.evaluation(number, loss)
        improved = loss < self.best_loss
        self.misses = 0 if improved else self.misses + 1
        if improved:
            self.best_step, self.best_loss = number, loss
        patience = self.config.train.early_stopping_patience
        if patience is not None and self.misses >= patience:
            self.stopped_early = True
            self.notice(
                f"no better held-out loss in {patience} evaluations: stopped at step {number}"
            )
        return improved or self.stopped_early

    def _loss_report(self, adapter: str | None) -> Beats[LossReport | None]:
        rows = self.held_out_rows
        if not len(rows):
            return None
        self.give_back()
        batches = in_batches(rows, budget_tokens=self.evaluation_tokens)
        measuring = loss_by_batch(self.base, read_by(batches, adapter))
        while True:
            try:
                batch = next(measuring)
            except StopIteration as done:
                report: LossReport = done.value
                break
            yield Beat("evaluated", batch.tokens)
        self.give_back()
        if report.limit_tokens is not None:
            self.evaluate_within(report.limit_tokens)
        yield Beat("evaluated", loss=report.loss)
        return report

    def _became(self, predicted: Plan) -> dict[str, Any]:
        """What the settings that leave the choice to the run were settled to."""
        return {
            "base.device": str(self.base.device),
            "base.dtype": str(self.base.dtype).removeprefix("torch."),
            "data.template": self.data.renderer.template,
            "train.gradient_checkpointing": predicted.recompute,
            "train.max_steps": self.total_steps,
            "train.warmup_steps": warmup_steps(self.config.train, self.total_steps),
            "train.eval_steps": self.eval_every,
            "train.save_steps": self.save_every,
        }


def data_size(data: Prepared) -> DataSize:
    lengths = data.train.lengths
    return DataSize(rows=len(lengths), tokens=int(sum(lengths)), longest=int(max(lengths)))


def day_of(folder: RunFolder) -> str | None:
    """The day that the run's templates print: that of its first start, None before it."""
    own = glimpse(folder.checkpoints).get("run")
    day = own.get("day") if isinstance(own, dict) else None
    return day if isinstance(day, str) else None


def stop_id(base: BaseModel) -> int | None:
    """What ends a document where the template names nothing: the model's own first stop token."""
    return base.stop_ids[0] if base.stop_ids else None
