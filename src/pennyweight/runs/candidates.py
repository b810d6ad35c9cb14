"""Both ways to merge, each written, opened and measured against the unmerged adapter.

The rule: the candidate whose predictions are closest to the adapter's is kept, by KL(adapter ||
candidate) in nats a token over the compared rows. What was evaluated until now is the adapter; a
merge is to be that very model in another form, so that every figure known of it still holds. A
lower held-out loss of the other one is said, not taken. Where the 95 % interval of the difference
in KL holds 0 the two are a tie, and `as-trained` is kept.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pennyweight.data.conversation import Example
from pennyweight.errors import AdapterError, DataError
from pennyweight.evaluate import Difference, LossReport, bootstrap, in_batches, paired
from pennyweight.lora import Adapter, check_fit
from pennyweight.merge import (
    Agreement,
    Comparison,
    Folded,
    Onto,
    Reader,
    Reference,
    beside,
    fold_into,
    is_stored_quantized,
)
from pennyweight.model import BaseModel
from pennyweight.train.memory import release_cached

__all__ = ["Arm", "Attempt", "Trial", "closest", "trial", "ways"]

TUNING_KEPT_AT_LEAST = 0.9
"""Share of the adapter's gain in held-out loss that a merged model must keep."""
DIVERGENCE_AT_MOST = 0.5
"""KL(adapter || merged) over KL(adapter || bare base): at 1 the merged model is as far from the
adapter as a base that was never tuned."""
NOTHING_CHANGED_NATS = 1e-9
"""KL(adapter || bare base) below which the adapter itself does nothing that could be merged."""
SAME_KL_NATS = 1e-6
"""Difference in KL that is none where a single row gives no interval."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One model on the compared rows: its losses, and how far it is from the unmerged adapter.

    `difference`: its loss minus the adapter's, row by row. `tuning_kept`: share of the adapter's
    gain over the bare base that it keeps; None where that gain is not beyond doubt.
    """

    name: str
    losses: LossReport
    agreement: Agreement
    document_kl: tuple[float, ...]
    difference: Difference
    tuning_kept: float | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **self.losses.to_dict(),
            "loss_difference": self.difference.to_dict(),
            "tuning_kept": self.tuning_kept,
            "mean_kl": self.agreement.mean_kl,
            "top1_agreement": self.agreement.top1_agreement,
            "max_logit_difference": self.agreement.max_logit_difference,
        }


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to merge: what was written, how it measured, and why it may not be kept, if so."""

    onto: Onto
    folded: Folded | None
    arm: Arm | None
    refused: str | None

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"name": self.onto, "refused": self.refused}
        if self.folded is not None:
            told["update_kept"] = self.folded.update_kept
        return told | (self.arm.to_dict() if self.arm else {})


@dataclass(frozen=True, slots=True)
class Trial:
    """Every way that was tried, beside the unmerged adapter and the bare base; `kept` stands in the
    folder, `why` it is that one."""

    adapter: Arm
    base: Arm
    attempts: tuple[Attempt, ...]
    kept: Attempt
    why: str
    notices: tuple[str, ...]


def ways(base: BaseModel, asked: Literal["auto", "as-trained", "original"]) -> tuple[Onto, ...]:
    """The bases to try: two where the base is held quantized and its files are not."""
    if asked != "auto":
        return (asked,)
    two = base.quantization != "none" and not is_stored_quantized(base)
    return ("as-trained", "original") if two else ("as-trained",)


def trial(
    base: BaseModel,
    adapter: Adapter,
    folder: Path,
    rows: Sequence[Example],
    *,
    bases: Sequence[Onto],
    dtype: torch.dtype | None,
    say: Callable[[str], None],
    name: str = "default",
) -> Trial:
    """Merge onto each base in turn, and leave the one that is kept in `folder`.

    `adapter` is attached as `name`. One candidate is resident beside the base at a time, and a
    candidate's folder is removed as soon as a better one is there.

    AdapterError: no candidate may be kept, each with its reason; or the adapter changes nothing.
    """
    check_fit(base, adapter)
    reader = Reader(base, name)
    say(f"reading {len(rows):,} rows with the adapter, and with the bare base")
    reference = Reference(reader, in_batches(rows))
    if not reference.tokens:
        raise DataError(f"{len(rows)} rows train no token, so there is nothing to compare on")
    compared = _Compared(reference, reader)
    if compared.base.agreement.mean_kl < NOTHING_CHANGED_NATS:
        raise AdapterError(
            f"on {len(rows):,} rows the adapter predicts what the bare base does (KL "
            f"{compared.base.agreement.mean_kl:.2g} nats a token): merging it would change nothing; "
            "was it trained?"
        )
    attempts: list[Attempt] = []
    for onto in bases:
        say(f"folding onto {onto}, and reading the rows with the merged model")
        attempts.append(_attempt(compared, adapter, folder / onto, onto=onto, dtype=dtype))
        left = [each for each in attempts if each.refused is None]
        keep = closest(left)[0].onto if left else None
        for each in attempts:
            if each.onto != keep:
                shutil.rmtree(folder / each.onto, ignore_errors=True)
    if not left:
        raise AdapterError.all([f"{each.onto}: {each.refused}" for each in attempts])
    kept, why = closest(left)
    for path in (folder / kept.onto).iterdir():
        path.rename(folder / path.name)
    (folder / kept.onto).rmdir()
    if len(bases) > 1 and len(left) == 1:
        why = "the other one is refused"
    notices = (*_worse(compared), *_notices(kept, attempts))
    return Trial(compared.adapter, compared.base, tuple(attempts), kept, why, notices)


def closest(attempts: Sequence[Attempt]) -> tuple[Attempt, str]:
    """The attempt to keep of those that may be kept, and why: the rule at the top of this file."""
    best, *others = attempts
    why = "the only way there is"
    for other in others:
        assert best.arm is not None, "what may be kept was measured"
        assert other.arm is not None
        mean = other.arm.agreement.mean_kl - best.arm.agreement.mean_kl
        changes = [b - a for a, b in zip(best.arm.document_kl, other.arm.document_kl, strict=True)]
        interval = bootstrap(changes, best.arm.losses.document_counts)
        low, high = interval or (mean - SAME_KL_NATS, mean + SAME_KL_NATS)
        if low <= 0 <= high:
            why = (
                f"a tie: the KL of {best.onto} and {other.onto} cannot be told apart on these rows"
            )
        elif high < 0:
            best, why = other, "its predictions are closest to the adapter's"
        else:
            why = "its predictions are closest to the adapter's"
    return best, why


class _Compared:
    """What every candidate is held against: the reference, the unmerged adapter, the bare base."""

    def __init__(self, reference: Reference, reader: Reader) -> None:
        self.reference, self.model = reference, reader.model
        own, bare = reference.compare(reader), reference.compare(Reader(reader.model))
        self.unmerged = self._losses(own)
        self.gain = paired(self.unmerged, self._losses(bare))
        self.adapter = self.arm("adapter", own)
        self.base = self.arm("base", bare)

    def arm(self, name: str, found: Comparison) -> Arm:
        losses = self._losses(found)
        difference = paired(self.unmerged, losses)
        sure = self.gain.interval is not None and self.gain.interval[0] > 0
        kept = 1 - difference.mean / self.gain.mean if sure else None
        return Arm(name, losses, found.agreement, found.document_kl, difference, kept)

    def _losses(self, found: Comparison) -> LossReport:
        return LossReport(
            math.fsum(found.document_losses),
            self.reference.tokens,
            found.correct,
            self.reference.sources,
            found.document_losses,
            self.reference.document_counts,
        )


def _attempt(
    compared: _Compared, adapter: Adapter, place: Path, *, onto: Onto, dtype: torch.dtype | None
) -> Attempt:
    place.mkdir()
    try:
        folded = fold_into(compared.model, adapter, place, onto=onto, dtype=dtype)
    except AdapterError as fault:
        return Attempt(onto, None, None, str(fault))
    merged = beside(compared.model, place)
    arm = compared.arm(onto, compared.reference.compare(Reader(merged)))
    device = merged.device
    del merged
    gc.collect()  # a model's modules hold each other in cycles
    release_cached(device)
    return Attempt(onto, folded, arm, _refusal(arm, compared))


def _refusal(arm: Arm, compared: _Compared) -> str | None:
    """Why this candidate may not be kept; None where it may."""
    mend = "merge with --dtype float32 or onto the other base, or keep the adapter apart"
    kl, bare_kl = arm.agreement.mean_kl, compared.base.agreement.mean_kl
    if not math.isfinite(kl) or not math.isfinite(arm.losses.loss_sum):
        return f"the merged model's predictions are not finite; {mend}"
    if arm.tuning_kept is not None and arm.tuning_kept < TUNING_KEPT_AT_LEAST:
        losses = (compared.base.losses, compared.unmerged, arm.losses)
        before, tuned, after = (each.loss for each in losses)
        return (
            f"lost the tuning: the adapter brought the held-out loss from {before:.4g} to "
            f"{tuned:.4g}, the merged model has {after:.4g}, {arm.tuning_kept:.0%} of that gain; at "
            f"least {TUNING_KEPT_AT_LEAST:.0%} must stay; {mend}"
        )
    if kl > DIVERGENCE_AT_MOST * bare_kl:
        return (
            f"lost the tuning: its predictions are {kl:.3g} nats a token (KL) from the adapter's, "
            f"those of the bare base {bare_kl:.3g}; at most {DIVERGENCE_AT_MOST:.0%} of that may be; "
            f"{mend}"
        )
    return None


def _worse(compared: _Compared) -> list[str]:
    """A note where the adapter itself is worse than no adapter: shapes may fit a wrong base too."""
    interval = compared.gain.interval
    if interval is None or interval[1] >= 0:
        return []
    return [
        f"on these rows the adapter is worse than its bare base (loss {compared.unmerged.loss:.4g}, "
        f"bare {compared.base.losses.loss:.4g}): is {compared.model.name} the base it was trained on?"
    ]


def _notices(kept: Attempt, attempts: Sequence[Attempt]) -> tuple[str, ...]:
    said = [f"{each.onto} was refused: {each.refused}" for each in attempts if each.refused]
    for other in attempts:
        if other is kept or other.refused or other.arm is None or kept.arm is None:
            continue
        change = paired(kept.arm.losses, other.arm.losses)
        if change.interval is not None and change.interval[1] < 0:
            low, high = change.interval
            said.append(
                f"{other.onto} has the lower held-out loss ({change.mean:.4g}, 95 % interval "
                f"{low:.4g} to {high:.4g}) and is another model than the one evaluated until now; "
                f"--base {other.onto} writes it"
            )
    return tuple(said)
