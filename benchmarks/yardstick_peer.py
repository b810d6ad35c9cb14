"""The yardstick's arms run by the peer: same rows, order, initial A and B, and held-out tokens.

    python -m benchmarks.yardstick_peer --data PATH [--methods full lora qlora]

PEFT trains LoRA and QLoRA (over bitsandbytes), transformers alone the whole model. Results go to
the yardstick's work folder, and into its page when that is written next.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.e2e import METHODS, described_run, write_first_references
from benchmarks.machine import circumstances
from benchmarks.parity_peft import batches_of, save_fresh_adapter
from benchmarks.peft_oracle import (
    dense_model,
    four_bit_model,
    their_curve,
    their_loss,
    with_adapter,
)
from pennyweight.config import RunConfig
from pennyweight.data.prepare import prepare
from pennyweight.model import load_base
from pennyweight.optim import lr_at

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the peer's arms that have no result yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yardstick_peer")
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and sft/")
    parser.add_argument("--work", type=Path, default=Path("runs/yardstick"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args(arguments)
    write_first_references(asked.data, asked.work)
    for method in asked.methods:
        path = asked.work / f"peer-{method}.json"
        if not path.is_file():
            run = described_run(method, asked.data, asked.work, seed=0, settings=asked.set)
            partial_file = path.with_suffix(".partial")
            partial_file.write_text(json.dumps(peer_arm(method, run.config)) + "\n")
            partial_file.replace(path)
            print(f"peer, {method}: done", flush=True)
    return 0


def peer_arm(method: str, config: RunConfig) -> dict[str, Any]:
    """Losses of the held-out rows before and after the peer's training, and what it took."""
    train, steps = config.train, config.train.max_steps
    assert steps is not None
    assert train.learning_rate is not None
    assert train.max_grad_norm is not None
    with tempfile.TemporaryDirectory() as work:
        base = load_base(config.base)
        data = prepare(
            config.data, base.tokenizer, seed=0, stop_id=base.stop_ids[0], cache_dir=Path(work)
        )
        folder = Path(config.base.model)
        model: nn.Module = four_bit_model(folder) if method == "qlora" else dense_model(folder)
        if method != "full":
            model = with_adapter(model, save_fresh_adapter(base, config, Path(work) / "adapter"))
        held = list(data.eval)
        before = their_loss(model, held)
        curve = their_curve(
            model,
            batches_of(data.train, seed=0, rows=train.batch_size, steps=steps),
            learning_rate_at=partial(
                lr_at,
                peak=train.learning_rate,
                total_steps=steps,
                warmup_steps=train.warmup_steps or 0,
                kind=train.lr_scheduler_type,
            ),
            max_grad_norm=train.max_grad_norm,
        )
    return {
        "method": method,
        "seed": 0,
        "before": before,
        "after": their_loss(model, held),
        "train_seconds": sum(curve.seconds),
        "tokens_per_second": curve.tokens / sum(curve.seconds),
        "padding": 1 - curve.tokens / curve.positions,
        "losses": [round(loss, 6) for loss in curve.losses],
        "circumstances": circumstances(PACKAGES),
    }


if __name__ == "__main__":
    raise SystemExit(main())
