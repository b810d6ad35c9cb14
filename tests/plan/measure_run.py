"""Run a few training steps in this process and print what memory they took, as JSON.

Not a test: `test_measured.py` starts it, so that the process's high-water mark is the run's own.
Argument: JSON with `folder`, `config` (a RunConfig), `tokens`, `documents`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def main() -> None:
    """Load, attach, two steps; what the process holds without tensors, and its peak, in bytes."""
    torch.set_num_threads(1)
    from pennyweight.config import RunConfig
    from pennyweight.data.batch import Batch
    from pennyweight.lora import attach, trained_parameters
    from pennyweight.model import load_base
    from pennyweight.optim import adamw
    from pennyweight.train import Trainee, enable_checkpointing, peak_memory_bytes

    given = json.loads(sys.argv[1])
    config = RunConfig.model_validate(given["config"])
    device = torch.device(config.base.device)
    marks: dict[str, int | None] = {}
    full = config.train.method == "full"
    base = load_base(config.base, trainable=full)
    name = None if full else "default"
    if full:
        parameters = dict(base.module.named_parameters())
    else:
        attach(base, config.adapter, seed=0)
        parameters = dict(trained_parameters(base, "default"))
    if config.train.gradient_checkpointing is True:
        enable_checkpointing(base)
    trainee = Trainee(base, parameters, adamw(parameters), learning_rate_at=lambda step: 1e-4)
    held = [*base.module.parameters(), *base.module.buffers()]
    held += [t for state in trainee.optimizer.state.values() for t in state.values()]
    marks["process"] = resident() - sum(t.nbytes for t in held)
    tokens, documents = given["tokens"], given["documents"]
    each = tokens // documents
    batch = Batch(
        ids=torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(0)),
        trained=torch.ones(tokens, dtype=torch.bool),
        positions=torch.arange(each).repeat(documents),
        boundaries=tuple(range(0, tokens + 1, each)),
        adapters=(name,) * documents,
        sources=("x",) * documents,
    )
    for _ in range(given.get("steps", 2)):
        trainee.forward_backward(batch)
        trainee.optim_step()
    marks["trained"] = peak_memory_bytes(device)
    print(json.dumps(marks))


def resident() -> int:
    """Bytes of this process in memory now."""
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
