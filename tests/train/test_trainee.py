"""One adapter's steps: one division, clipping, what is refused, what is split, what is restored."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pennyweight.config import LoraConfig
from pennyweight.data.batch import Batch
from pennyweight.errors import DiskError, DivergedError, MemoryExhausted
from pennyweight.evaluate import evaluate_loss, read_by
from pennyweight.lora import adapter_of, attach, detach, trained_parameters
from pennyweight.model import BaseModel
from pennyweight.optim import adamw
from pennyweight.train import Trainee, disable_checkpointing, enable_checkpointing

BatchOf = Callable[..., Batch]


def gradients(trainee: Trainee) -> list[Tensor]:
    return [p.grad.clone() for p in trainee.parameters.values() if p.grad is not None]


def masters(trainee: Trainee) -> list[Tensor]:
    return [p.detach().clone() for p in trainee.parameters.values()]


def warmed(trainee: Trainee, batch_of: BatchOf) -> None:
    """One step, so that B is no longer zero and A has gradients."""
    trainee.forward_backward(batch_of(9))
    trainee.optim_step()


def test_the_step_is_the_mean_over_all_trained_tokens(base: BaseModel, batch_of: BatchOf) -> None:
    """AdamW sees sum / count over the whole window, whatever way it was cut."""
    seen: list[list[Tensor]] = []
    losses: list[float] = []
    for windows in ([(0, 1, 9)], [(0,), (1, 9)], [(9,), (1,), (0,)]):
        parameters = trained_parameters(base, "default")
        trainee = Trainee(base, parameters, adamw(parameters), learning_rate_at=lambda step: 0.0)
        for window in windows:
            trainee.forward_backward(batch_of(*window))
        kept: list[Tensor] = []
        trainee.optimizer.register_step_pre_hook(
            lambda *_, kept=kept, trainee=trainee: kept.extend(gradients(trainee))
        )
        step = trainee.optim_step()
        seen.append(kept)
        losses.append(step.loss)
        assert step.trained_tokens == 3 + 5 + 21
        assert step.tokens == 5 + 7 + 23
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_clipping_is_by_the_norm_of_the_mean(trainee: Trainee, batch_of: BatchOf) -> None:
    trainee.max_grad_norm = 0.05
    seen: list[Tensor] = []
    trainee.optimizer.register_step_pre_hook(lambda *_: seen.extend(gradients(trainee)))
    trainee.forward_backward(batch_of(4, 5))
    step = trainee.optim_step()
    assert step.grad_norm > 0.05
    assert math.sqrt(sum(float(g.square().sum()) for g in seen)) == pytest.approx(0.05, rel=1e-4)


def test_rows_with_nothing_trained_change_nothing(trainee: Trainee, batch_of: BatchOf) -> None:
    batch = batch_of(3)
    batch.trained[:] = False
    before = masters(trainee)
    trainee.forward_backward(batch)
    step = trainee.optim_step()
    assert (step.loss, step.trained_tokens, step.skipped) == (0.0, 0, True)
    assert "no token" in step.notices[0]
    for one, two in zip(before, masters(trainee), strict=True):
        assert torch.equal(one, two)


def poison_loss(trainee: Trainee, batch: Batch) -> None:
    trainee.forward_backward(batch)
    trainee._sums[-1] = (trainee._sums[-1][0] * math.nan, trainee._sums[-1][1])


def poison_gradient(trainee: Trainee, batch: Batch) -> None:
    trainee.forward_backward(batch)
    gradient = next(iter(trainee.parameters.values())).grad
    assert gradient is not None
    gradient[0, 0] = math.inf


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_what_is_not_finite_never_reaches_the_weights(
    trainee: Trainee, batch_of: BatchOf, poison: Callable[[Trainee, Batch], None]
) -> None:
    warmed(trainee, batch_of)
    before = {name: tensor.clone() for name, tensor in trainee.tensors().items()}
    trainee.forward_backward(batch_of(0))
    poison(trainee, batch_of(2))
    step = trainee.optim_step()
    assert step.skipped
    assert step.number == 2
    assert "rows.jsonl:3" in step.notices[0]
    assert ("rows.jsonl:1" in step.notices[0]) == (poison is poison_gradient)
    for name, tensor in trainee.tensors().items():
        assert torch.equal(tensor, before[name]), name
    trainee.forward_backward(batch_of(0))
    assert not trainee.optim_step().skipped
    assert (trainee.skipped_steps, trainee.skipped_in_a_row) == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_of_a_micro_batch_only_the_guilty_row_is_named(
    trainee: Trainee, batch_of: BatchOf, value: float
) -> None:
    """Row 4 carries a token that no other row has, and whose hidden state is not finite."""
    batch = batch_of(0, 1, 2, 3, 4)
    of_the_others = set(batch_of(0, 1, 2, 4).ids.tolist())
    token = next(i for i in batch_of(3).ids.tolist() if i not in of_the_others)

    def spoil(_module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == token)[..., None], value)

    embedding = trainee.base.module.get_input_embeddings()
    with embedding.register_forward_hook(spoil):
        trainee.forward_backward(batch)
        step = trainee.optim_step()
    assert step.skipped
    assert "the loss is not finite; rows rows.jsonl:4; the step is skipped" in step.notices[0]


def test_a_bound_of_skipped_steps_in_a_row(trainee: Trainee, batch_of: BatchOf) -> None:
    warmed(trainee, batch_of)
    for _ in range(3):
        poison_loss(trainee, batch_of(2))
        assert trainee.optim_step().skipped
    poison_loss(trainee, batch_of(6, 7))
    with pytest.raises(DivergedError, match=r"rows\.jsonl:7, rows\.jsonl:8") as caught:
        trainee.optim_step()
    assert caught.value.exit_code == 5
    assert "as after step 1" in str(caught.value)
    assert all(t.isfinite().all() for t in trainee.tensors().values())


class Allocator:
    """Stands before `base.hidden` and has room for so many tokens."""

    def __init__(self, base: BaseModel, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room, self.hidden, self.passes = room, base.hidden, 0
        self.late = False
        monkeypatch.setattr(base, "hidden", self)

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.passes += 1
        hidden = self.hidden(ids, positions)
        if len(ids) > self.room and not self.late:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if len(ids) > self.room:
            hidden.register_hook(self.fail)
        return hidden

    @staticmethod
    def fail(_gradient: Tensor) -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
def test_out_of_memory_splits_and_the_steps_stay_the_same(
    trainee: Trainee, batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    windows = [[(0, 1), (2, 9, 3, 8)], [(4, 5), (6, 7)], [(8, 9), (0, 2)]]

    def run(learner: Trainee) -> list[float]:
        losses = []
        for window in windows:
            for places in window:
                learner.forward_backward(batch_of(*places))
            step = learner.optim_step()
            losses.append(step.loss)
            notices.extend(step.notices)
        return losses

    notices: list[str] = []
    start = masters(trainee)
    expected = run(trainee)
    weights = masters(trainee)
    assert notices == []
    with torch.no_grad():
        for parameter, value in zip(trainee.parameters.values(), start, strict=True):
            parameter.copy_(value)
    again = Trainee(
        trainee.base, trainee.parameters, adamw(trainee.parameters), learning_rate_at=lambda _: 1e-2
    )
    allocator = Allocator(trainee.base, 40, monkeypatch)
    allocator.late = late
    assert run(again) == pytest.approx(expected, rel=1e-6)
    assert len(notices) == 1
    assert "step 1: out of memory with 64 tokens at once" in notices[0]
    assert again.limit_tokens == 32
    assert again.progress()["limit_tokens"] == 32
    for one, two in zip(weights, masters(again), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_one_row_that_does_not_fit_is_named(
    trainee: Trainee, batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    Allocator(trainee.base, 10, monkeypatch)
    with pytest.raises(MemoryExhausted, match=r"rows\.jsonl:10: one row of 23 tokens") as caught:
        trainee.forward_backward(batch_of(0, 9))
    assert caught.value.exit_code == 6


def test_other_runtime_errors_are_not_taken_for_memory(
    trainee: Trainee, batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(ids: Tensor, positions: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(trainee.base, "hidden", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trainee.forward_backward(batch_of(0, 1))


def test_recomputing_layers_changes_no_bit(trainee: Trainee, batch_of: BatchOf) -> None:
    warmed(trainee, batch_of)
    loss, _ = trainee.forward_backward(batch_of(2, 3))
    expected = gradients(trainee)
    for parameter in trainee.parameters.values():
        parameter.grad = None
    enable_checkpointing(trainee.base)
    again, _ = trainee.forward_backward(batch_of(2, 3))
    disable_checkpointing(trainee.base)
    assert torch.equal(loss, again)
    for one, two in zip(expected, gradients(trainee), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_of_another_run_is_refused_whole(trainee: Trainee, batch_of: BatchOf) -> None:
    warmed(trainee, batch_of)
    tensors, progress = dict(trainee.tensors()), trainee.progress()
    name = next(n for n in tensors if n.startswith("parameter/"))
    tensors[name] = torch.zeros(1, 1)
    tensors["parameter/strange"] = torch.zeros(1)
    del progress["epoch"]
    before = masters(trainee)
    with pytest.raises(DiskError) as caught:
        trainee.restore(tensors, progress)
    assert len(str(caught.value).splitlines()) == 3
    for one, two in zip(before, masters(trainee), strict=True):
        assert torch.equal(one, two)


def test_a_reader_between_steps_sees_the_weights_of_now(
    trainee: Trainee, batch_of: Callable[..., Batch]
) -> None:
    """What inference stacks of the factors is made anew after a step, fused optimizers included."""
    batch = batch_of(0, 1)
    losses = []
    for _ in range(3):
        losses.append(evaluate_loss(trainee.base, [batch]).loss)
        kept = adapter_of(trainee.base, "default", LoraConfig(r=4))
        attach(trainee.base, kept, name="copy", trainable=False)
        apart = evaluate_loss(trainee.base, read_by([batch], "copy")).loss
        detach(trainee.base, "copy")
        assert losses[-1] == pytest.approx(apart, rel=1e-6)
        trainee.forward_backward(batch_of(0, 1))
        trainee.optim_step()
    assert len(set(losses)) == 3


def test_memory_that_does_not_do_moves_moments_first(
    base: BaseModel, batch_of: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = trained_parameters(base, "default")
    optimizer = adamw(named, kind="paged_adamw_32bit")
    trainee = Trainee(base, named, optimizer, learning_rate_at=lambda step: 1e-2)
    hidden = base.hidden

    def scarce(ids: Tensor, positions: Tensor) -> Tensor:
        if optimizer.pager.here_bytes:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return hidden(ids, positions)

    monkeypatch.setattr(base, "hidden", scarce)
    trainee.forward_backward(batch_of(2, 3))
    step = trainee.optim_step()
    assert trainee.limit_tokens is None
    assert len(step.notices) == 1
    assert "moved to host memory" in step.notices[0]
    trainee.forward_backward(batch_of(4))
    assert trainee.optim_step().notices == ()
