"""What goes wrong inside a step: losses and gradients that are not finite, memory that runs out.

Injected through torch's own hooks on every module: into the hidden states or the gradient of one
row's tokens, and as an allocation that fails. The rest is the command as it is.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from campaigns.small_run import write_rows
from campaigns.small_world import World
from campaigns.tally import Tally

__all__ = ["non_finite", "out_of_memory"]

ROWS = 26
DIVERGED, MEMORY, INTERRUPTED, DONE = 5, 6, 75, 0
MARK = "§"
INJECTIONS, LOSS_TOLERANCE = 100, 1e-6


@dataclass(frozen=True, slots=True)
class Poison:
    """A value put over what one row's tokens carry, forwards or backwards."""

    name: str
    value: float
    backwards: bool = False

    def take_effect(self, mark_id: int) -> None:
        """In the child: hooks on every embedding and every feed-forward."""
        import torch

        seen: list[torch.Tensor] = []

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            name = type(module).__name__
            if name == "Embedding":
                ids = inputs[0].reshape(-1)
                seen[:] = [ids == mark_id]
            if not name.endswith(("MLP", "FeedForward")) or not seen or not seen[0].any():
                return None
            mask = seen[0].reshape(output.shape[:-1])[..., None]
            if not self.backwards:
                return output.masked_fill(mask, self.value)
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient.masked_fill(mask, self.value))
            return None

        torch.nn.modules.module.register_module_forward_hook(hook)


POISONS = (
    Poison("NaN in the loss", math.nan),
    Poison("infinity in the loss", math.inf),
    Poison("a loss that overflows", 3e38),
    Poison("NaN in the gradient", math.nan, backwards=True),
    Poison("infinity in the gradient", -math.inf, backwards=True),
)


def non_finite(tally: Tally, cases: int | None) -> None:
    world = World.made(tally.folder)
    mark_id = _id_of(world)
    chosen = [(poison, row) for row in range(1, 20) for poison in POISONS]
    if cases is not None:
        chosen = random.Random(1).sample(chosen, cases)
    skipped = 0
    for poison, row in chosen:
        _mark(world, [row])
        description = world.describe("poisoned", train__save_steps=1, train__save_total_limit=99)
        shutil.rmtree(description.with_suffix(""), ignore_errors=True)
        child = world.train(description, before=partial(poison.take_effect, mark_id))
        fault, steps = _survived(description.with_suffix(""), child.wait(), child.said, row)
        skipped += steps
        tally.case(f"{poison.name}, row {row}", fault)
    for poison in POISONS[: 1 if cases else None]:
        _mark(world, list(range(1, ROWS + 1)))
        description = world.describe(
            "poisoned", data__eval_fraction=0.0, train__eval_steps=None, train__save_steps=1
        )
        shutil.rmtree(description.with_suffix(""), ignore_errors=True)
        child = world.train(description, before=partial(poison.take_effect, mark_id))
        code = child.wait()
        stopped = (
            code == DIVERGED and "rows.jsonl:" in child.said and "steps in a row" in child.said
        )
        fault = None if stopped else f"ended with {code}: {child.said[-300:]}"
        tally.case(f"{poison.name}, every row", fault or _all_finite(description.with_suffix("")))
    tally.remark(f"{skipped} optimizer steps skipped, 0 non-finite tensors saved")


def _id_of(world: World) -> int:
    """A token that only marked rows have."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    ids = tokenizer(MARK, add_special_tokens=False)["input_ids"]
    return int(ids[-1])


def _mark(world: World, rows: list[int]) -> None:
    path = write_rows(world.folder / "rows.jsonl", ROWS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        lines[row - 1]["messages"][1]["content"] += MARK
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _survived(run: Path, code: int, said: str, row: int) -> tuple[str | None, int]:
    """What broke the promise, and how many steps were skipped."""
    named = f"rows.jsonl:{row}"
    if code == DIVERGED:  # the row is held out: no step, but its loss is refused
        held = f"{named}: the loss of this held-out row" in said
        return (_all_finite(run) if held else f"ended with 5: {said[-300:]}"), 0
    if code != DONE:
        return f"ended with {code}: {said[-300:]}", 0
    from pennyweight.report import read_events

    steps = [e for e in read_events(run / "events.jsonl") if e["kind"] == "step"]
    skipped = [e["number"] for e in steps if e["skipped"]]
    notices = [n for e in steps for n in e["notices"] if "not finite" in n]
    if not skipped:
        held = _is_held_out(run, named)  # then it has a loss, and no gradient
        return (_all_finite(run) if held else "no step was skipped"), 0
    if any(f"rows {named};" not in n for n in notices) or len(notices) != len(skipped):
        return f"the row is not named alone: {notices}", 0
    return _all_finite(run) or _weights_stood_still(run, skipped), len(skipped)


def _is_held_out(run: Path, source: str) -> bool:
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return any(row["source"] == source and row["part"] == "eval" for row in rows)


def _all_finite(run: Path) -> str | None:
    from safetensors.torch import load_file

    for path in run.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{path.name}: {name} is not finite"
    return None


def _weights_stood_still(run: Path, skipped: list[int]) -> str | None:
    """A skipped step left weights and moments as the step before it had them."""
    from pennyweight.train import load_step

    for number in skipped:
        before, after = (load_step(run / "checkpoints", n).tensors for n in (number - 1, number))
        moved = [n for n in after if "random/" not in n and not bool((before[n] == after[n]).all())]
        if moved:
            return f"step {number} was skipped, and {moved[0]} moved"
    return None


def out_of_memory(tally: Tally, cases: int | None) -> None:
    """An allocation that fails beyond so many tokens, from the first pass on or all of a sudden."""
    world = World.made(tally.folder)
    chosen = [
        (packing, count, share, later)
        for packing in (True, False)
        for count in (1, 2, 4)
        for share in (2, 4)
        for later in (0, 7)
    ]
    if cases is not None:
        chosen = random.Random(1).sample(chosen, cases)
    worst = 0.0
    for packing, count, share, later in chosen:
        shape: dict[str, Any] = {
            "adapter": {"r": 4},
            "data__packing": packing,
            "train__gradient_accumulation_steps": count,
        }
        if not packing:
            shape |= {"train__tokens_per_step": None, "train__batch_size": 6}
        roomy = world.describe("roomy", **shape)
        shutil.rmtree(roomy.with_suffix(""), ignore_errors=True)
        world.whole(roomy)
        limit = _largest_batch(roomy.with_suffix("")) // share
        tight = world.describe("tight", **shape)
        shutil.rmtree(tight.with_suffix(""), ignore_errors=True)
        child = world.train(tight, before=partial(_fail_beyond, limit, later))
        code = child.wait()
        fault, apart = f"ended with {code}: {child.said[-400:]}", 0.0
        if code == DONE:
            fault, apart = _same_losses(roomy.with_suffix(""), tight.with_suffix(""))
        elif code == MEMORY and "does not fit in memory" in child.said:
            fault = "" if limit < 64 else fault  # one row alone is past the limit
        worst = max(worst, apart)
        name = (
            f"{'packed' if packing else 'unpacked'}, accumulation {count}, 1/{share}, call {later}"
        )
        tally.case(name, fault or None)
    tally.remark(f"losses differ by at most {worst:.1e} nats")


def _fail_beyond(limit: int, later: int) -> None:
    """In the child: a pass that keeps gradients over more tokens than this is out of memory."""
    import torch

    passes = 0

    def hook(module: Any, inputs: Any) -> None:
        nonlocal passes
        if type(module).__name__ != "Embedding" or torch.is_inference_mode_enabled():
            return
        passes += 1
        if passes > later and inputs[0].numel() > limit:
            raise torch.OutOfMemoryError(f"injected beyond {limit} tokens")

    torch.nn.modules.module.register_module_forward_pre_hook(hook)


def _largest_batch(run: Path) -> int:
    from pennyweight.report import read_events

    return next(e["tokens"] for e in read_events(run / "events.jsonl") if e["kind"] == "rehearsal")


def _same_losses(roomy: Path, tight: Path) -> tuple[str | None, float]:
    """Step by step the same loss, tokens and rate; and that it was said."""
    from pennyweight.report import read_events

    clean, cut = (
        [e for e in read_events(run / "events.jsonl") if e["kind"] == "step"]
        for run in (roomy, tight)
    )
    for name in ("number", "tokens", "trained_tokens", "learning_rate", "epoch"):
        if [e[name] for e in clean] != [e[name] for e in cut]:
            return f"{name} differs", 0.0
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(clean, cut, strict=True))
    if apart > LOSS_TOLERANCE:
        return f"losses differ by {apart:.2e}", apart
    receipts = [json.loads((run / "receipt.json").read_text()) for run in (roomy, tight)]
    if not any("out of memory" in n for n in receipts[1]["result"]["notices"]):
        return "nothing was said of it", apart
    before, after = (r["plan"]["micro_batch_tokens"] for r in receipts)
    if after >= before:
        return f"the plan was not corrected: {before} tokens, then {after}", apart
    return None, apart
