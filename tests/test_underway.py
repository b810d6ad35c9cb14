# ruff: noqa: F811 - fixtures of another file are arguments here
"""Runs beat by beat over one resident base: they take turns, stop, resume and leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pennyweight.config import RunConfig, resolve
from pennyweight.errors import ConfigError, Interrupted
from pennyweight.finetune import Beat, finetune, outcome, prepared, underway
from pennyweight.lora import attached
from pennyweight.model import BaseModel, load_base
from pennyweight.train import RunLock, StopRequest
from tests.test_finetune import description, log, rows  # noqa: F401 - fixtures


@pytest.fixture
def base(description) -> BaseModel:
    return load_base(resolve(description()).base)


def weights(config: RunConfig) -> dict[str, bytes]:
    found = load_file(Path(config.output_dir) / "adapter" / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def test_beats_tell_every_piece_and_add_up(description, base):
    config = description(gradient_accumulation_steps=2)
    beats = underway(config, base=base, name="a")
    seen: list[Beat] = []
    while True:
        try:
            seen.append(next(beats))
        except StopIteration as done:
            result = done.value
            break
    steps = [beat.step for beat in seen if beat.kind == "stepped"]
    pieces = [beat for beat in seen if beat.kind == "micro_batch"]
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert sum(beat.trained_tokens for beat in pieces) == result.trained_tokens
    assert sum(beat.tokens for beat in pieces) == sum(step.tokens for step in steps)
    assert sum(beat.trained_tokens for beat in seen if beat.kind != "micro_batch") == 0
    losses = [beat.loss for beat in seen if beat.loss is not None]
    assert losses == [
        *(e["loss"] for e in log(result.output_dir) if e["kind"] == "evaluation"),
        result.loss_after,
    ]
    assert seen[0].kind == "prepared"
    assert all(beat.seconds > 0 for beat in seen)
    assert {beat.kind for beat in seen} >= {"evaluated", "saved"}


def test_a_closed_run_leaves_the_base_bare_and_its_folder_free(description, base):
    config = description(save_steps=2)
    beats = underway(config, base=base, name="a")
    for beat in beats:
        if beat.kind == "micro_batch":
            assert attached(base) == ["a"]
        if beat.kind == "stepped" and beat.step.number == 3:
            break
    with pytest.raises(ConfigError, match="another run is writing here"):
        next(underway(config, base=base, name="b"))
    beats.close()
    assert attached(base) == []
    with RunLock(Path(config.output_dir)):
        pass
    result = outcome(underway(config, base=base, name="b"))
    assert result.resumed_from == 2
    whole = description("whole", save_steps=2)
    finetune(whole)
    assert weights(config) == weights(whole)
    assert log(config.output_dir) == log(whole.output_dir)


def test_a_pause_saves_and_touches_no_random_state_of_the_process(description, base):
    config = description()
    stop = StopRequest()
    beats = underway(config, base=base, name="a", stop=stop)

    def until_step_2() -> Iterator[Beat]:
        for beat in beats:
            if beat.kind == "stepped" and beat.step.number == 2:
                stop.ask("paused")
            yield beat

    with pytest.raises(Interrupted, match="paused after step 2 of 6"):
        list(until_step_2())
    assert attached(base) == []
    before = torch.get_rng_state()
    torch.manual_seed(1)
    mine = torch.get_rng_state()
    assert outcome(underway(config, base=base, name="a")).resumed_from == 2
    assert torch.equal(torch.get_rng_state(), mine)
    torch.set_rng_state(before)


def test_what_would_change_the_base_or_needs_another_is_refused(description, base):
    with pytest.raises(ConfigError, match="full changes the base itself"):
        next(underway(description("full", method="full"), base=base))
    with pytest.raises(ConfigError, match="asks for none, the resident base is nf4"):
        next(underway(description("other", method="lora"), base=base))
    assert attached(base) == []


def test_rows_may_be_prepared_ahead_in_another_thread(description, base):
    config = description("ahead")
    found = []
    worker = threading.Thread(target=lambda: found.append(prepared(config)))
    worker.start()
    worker.join()
    outcome(underway(config, base=base, data=found[0]))
    finetune(description("alone"))
    assert weights(config) == weights(description("alone"))


def test_a_run_that_cannot_begin_takes_its_adapter_off(description, base, monkeypatch):
    def no_room(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("pennyweight.finetune.run.trainee", no_room)
    with pytest.raises(MemoryError):
        outcome(underway(description(), base=base))
    assert attached(base) == []
