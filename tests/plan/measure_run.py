"""Run a few training steps in this process and print what memory they took, as JSON.

Not a test: `test_measured.py` starts it, so that the process's high-water mark is the run's own.
Argument: JSON with `folder`, `config` (a RunConfig), `tokens`, `documents`.
"""

from __future__ import annotations

import json
import sys

import torch


def main() -> None:
    """Load, attach, two steps; high-water marks after each stage, in bytes."""
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
    marks = {"imported": peak_memory_bytes(torch.device("cpu"))}
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
    marks["loaded"] = peak_memory_bytes(device)
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


if __name__ == "__main__":
    main()
