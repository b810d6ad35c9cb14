"""What a card counted under each recompute policy, and in the lean setting, against the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pennyweight.data.batch import Batch
from pennyweight.finetune.learner import trainee, what_learns
from pennyweight.model import load_base
from pennyweight.plan import Plan, named_device, plan
from tests.plan.conftest import run_config

SHAPE = {
    "layers": 12,
    "hidden": 1024,
    "intermediate": 2816,
    "heads": 16,
    "kv_heads": 8,
    "vocab": 16384,
    "max_positions": 4096,
}
TOKENS = 4096
LEAN = {
    "base": {"embedding_device": "host"},
    "train": {"gradient_checkpointing": "offloaded", "optim": "paged_adamw_8bit"},
}


def described(model: Any, changes: dict[str, dict[str, Any]]) -> Any:
    config = run_config(model.folder, tokens=TOKENS, dtype="bfloat16", r=16)
    groups = {"base": {"device": "cuda"}, "train": {"learning_rate": 1e-4}}
    for group, settings in changes.items():
        groups[group] = {**groups[group], **settings}
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=new) for name, new in groups.items()}
    )


def measured(config: Any, predicted: Plan) -> int:
    """The most that was allocated at once over two steps of one row."""
    base = load_base(config.base)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    learner = trainee(base, config, what_learns(base, config), 2, predicted)
    batch = Batch(
        ids=torch.randint(0, 256, (TOKENS,)),
        trained=torch.ones(TOKENS, dtype=torch.bool),
        positions=torch.arange(TOKENS),
        boundaries=(0, TOKENS),
        adapters=("default",),
        sources=("row",),
    )
    for _ in range(2):
        learner.forward_backward(batch)
        learner.optim_step()
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"train": {"gradient_checkpointing": p}}
            for p in ("none", "minimal", "full", "offloaded")
        ),
        LEAN,
    ],
    ids=str,
)
def test_a_card_counts_what_was_planned(sized_model: Any, changes: dict[str, Any]) -> None:
    model = sized_model(**SHAPE)
    config = described(model, changes)
    predicted = plan(config, model.shapes, device=named_device("cuda"))
    found = measured(config, predicted)
    assert predicted.allocated_bytes == pytest.approx(found, rel=0.15)


@pytest.mark.gpu
def test_a_smaller_budget_recomputes_fewer_layers_and_is_kept(sized_model: Any) -> None:
    """`auto` under a budget between `none` and `full`: in some layers, and within the budget."""
    model = sized_model(**SHAPE)
    config = described(model, {"train": {"gradient_checkpointing": "auto"}})
    card = named_device("cuda")
    peaks = plan(config, model.shapes, device=card).peak_by_policy
    budget = (peaks["none"] + peaks["full"]) // 2
    predicted = plan(config, model.shapes, device=card, budget_bytes=budget)
    assert predicted.recompute in ("minimal", "full")
    assert 0 < predicted.recomputed_layers < SHAPE["layers"]
    spare = predicted.peak_bytes - predicted.allocated_bytes
    assert measured(config, predicted) <= (budget - spare) * 1.1
