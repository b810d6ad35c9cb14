"""What else happens to a run's folder, data and clock; and a run that is not the same any more.

`changed`: everything that shapes a run, changed between a stop and the same command, is refused
with its name. `run`: folders without rights, data that vanishes or changes, a clock that goes
back, two runs in one folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from campaigns.children import Child, stop_before
from campaigns.small_run import bits, build_model, write_rows
from campaigns.small_world import World
from campaigns.tally import Absent, Tally

__all__ = ["changed", "run"]

USAGE, DATA, DISK, INTERRUPTED, DONE = 2, 65, 74, 75, 0
_CAPABILITY_VERSION = 0x20080522
STOPPED_AFTER = 3

Change = tuple[str, dict[str, Any], Callable[[Path], object] | None]
"""What the refusal must name; settings; or something done to the folder of model and rows."""

SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("seed", {"seed": 1}),
    ("base.quantization", {"base__quantization": "fp4"}),
    ("base.double_quantization", {"base__double_quantization": False}),
    ("base.dtype", {"base__dtype": "bfloat16"}),
    ("adapter.r", {"adapter__r": 8}),
    ("adapter.lora_alpha", {"adapter__lora_alpha": 16}),
    ("adapter.lora_dropout", {"adapter__lora_dropout": 0.2}),
    ("adapter.target_modules", {"adapter__target_modules": "attention"}),
    ("adapter.use_rslora", {"adapter__use_rslora": True}),
    ("data.max_length", {"data__max_length": 48}),
    ("data.packing", {"data__packing": False, "train__tokens_per_step": None}),
    ("data.train_on", {"data__train_on": "all"}),
    ("data.eval_fraction", {"data__eval_fraction": 0.3}),
    ("train.learning_rate", {"train__learning_rate": 2e-2}),
    ("train.gradient_accumulation_steps", {"train__gradient_accumulation_steps": 4}),
    ("train.max_steps", {"train__max_steps": 12}),
    ("train.lr_scheduler_type", {"train__lr_scheduler_type": "linear"}),
    ("train.adam_beta2", {"train__adam_beta2": 0.99}),
    ("train.max_grad_norm", {"train__max_grad_norm": 0.5}),
    ("evaluate.max_rows", {"evaluate": {"max_rows": 3}}),
)


def changed(tally: Tally, cases: int | None) -> None:
    world = World.made(tally.folder)
    expected = world.whole(world.describe("whole"))
    description = world.describe("run")
    _stop(world, description)
    kept = world.folder / "kept"
    description.with_suffix("").rename(kept)
    every: list[Change] = [(name, settings, None) for name, settings in SETTINGS]
    every += [
        ("rows.jsonl", {}, _one_letter),
        ("rows.jsonl", {}, _last_row_away),
        ("rows.jsonl", {}, _two_rows_swapped),
        ("base", {}, _another_base),
        ("tokenizer", {}, _another_tokenizer),
    ]
    for name, settings, act in _some(every, cases):
        world.copy(kept, description.with_suffix(""))
        _make_anew(world)
        world.describe("run", **settings)
        if act is not None:
            act(world.folder)
        child = world.train(description)
        code = child.wait()
        refused = code == USAGE and any(
            name in line and "the checkpoint was made with" in line
            for line in child.said.split("\n")
        )
        fault = None if refused else f"ended with {code}: {child.said[-300:]}"
        world.describe("run")
        _make_anew(world)
        label = f"{name} {act.__name__.strip('_')}" if act else name
        tally.case(label, fault or world.ends_the_same(description, expected))


def _stop(world: World, description: Path) -> None:
    """The run, stopped by a SIGTERM after its third step."""
    _stop_with(world, description, STOPPED_AFTER, lambda: None)


def _some(every: list[Any], cases: int | None) -> list[Any]:
    """About so many of them, spread."""
    return every if cases is None else every[:: max(1, len(every) // cases)]


def _make_anew(world: World) -> None:
    shutil.rmtree(world.folder / "model")
    build_model(world.folder / "model")
    write_rows(world.folder / "rows.jsonl")


def _one_letter(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text().replace("green", "Green", 1))


def _last_row_away(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))


def _two_rows_swapped(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    first, second, *rest = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([second, first, *rest]))


def _another_base(folder: Path) -> None:
    """The same shapes, one weight another."""
    from safetensors.torch import load_file, save_file

    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def _another_tokenizer(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    path.write_text(json.dumps(tokenizer))


def run(tally: Tally, cases: int | None) -> None:
    world = World.made(tally.folder)
    expected = world.whole(world.describe("whole"))
    every = [
        _no_rights_from_the_start,
        _no_rights_to_resume,
        _rights_taken_on_the_way,
        _data_gone_before,
        _data_gone_between,
        _data_gone_on_the_way,
        _data_changed_on_the_way,
        _data_changed_while_read,
        _cache_gone_on_the_way,
        _clock_goes_back,
        _file_times_lie,
        _two_runs_in_one_folder,
        _many_at_once,
        _owner_killed,
    ]
    for mishap in _some(every, cases):
        write_rows(world.folder / "rows.jsonl")
        description = world.describe("run")
        shutil.rmtree(description.with_suffix(""), ignore_errors=True)
        try:
            fault = mishap(world, description, expected)
        except Absent as absent:
            tally.say(f"{mishap.__name__}: skipped, {absent}")
            continue
        tally.case(mishap.__name__.strip("_").replace("_", " "), fault)


def _ended(child: Child, code: int, *said: str) -> str | None:
    ended = child.wait()
    if ended != code or any(words not in child.said for words in said):
        return f"ended with {ended}, not {code} and {said}: {child.said[-400:]}"
    return None


def _bound_by_rights() -> None:
    """In the child: give up what lets root write anywhere (capset(2)); others are bound already."""
    if os.getuid() != 0:
        return
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    if ctypes.CDLL(None).capset(header, bytes(24)) != 0:
        raise OSError("capset: the rights of root could not be given up")


def _no_rights_from_the_start(world: World, description: Path, expected: str) -> str | None:
    folder = description.with_suffix("")
    folder.mkdir()
    folder.chmod(0o555)
    child = world.train(description, before=_bound_by_rights)
    fault = _ended(child, DISK, f"{folder}: cannot be written to (Permission denied)")
    folder.chmod(0o755)
    return fault or world.ends_the_same(description, expected)


def _no_rights_to_resume(world: World, description: Path, expected: str) -> str | None:
    _stop(world, description)
    folder = description.with_suffix("")
    (folder / "checkpoints").chmod(0o555)
    fault = _ended(
        world.train(description, before=_bound_by_rights),
        DISK,
        "Permission denied",
        "of step 3, is untouched",
    )
    (folder / "checkpoints").chmod(0o755)
    return fault or world.ends_the_same(description, expected)


def _rights_taken_on_the_way(world: World, description: Path, expected: str) -> str | None:
    from pennyweight.finetune.run import Run

    def before() -> None:
        _bound_by_rights()
        stop_before(Run.save.__code__, 3)

    child = world.train(description, before=before)
    assert child.until(child.stopped), child.said
    checkpoints = description.with_suffix("") / "checkpoints"
    checkpoints.chmod(0o555)
    child.send(signal.SIGCONT)
    fault = _ended(child, DISK, "not written (Permission denied)", "is untouched")
    checkpoints.chmod(0o755)
    return fault or world.ends_the_same(description, expected)


def _data_gone_before(world: World, description: Path, expected: str) -> str | None:
    rows = world.folder / "rows.jsonl"
    rows.rename(rows.with_suffix(".away"))
    fault = _ended(world.train(description), DATA, "rows.jsonl: no such file")
    rows.with_suffix(".away").rename(rows)
    return fault or world.ends_the_same(description, expected)


def _data_gone_between(world: World, description: Path, expected: str) -> str | None:
    _stop(world, description)
    return _data_gone_before(world, description, expected)


def _at_the_fourth_step(world: World, description: Path, act: Callable[[], object]) -> Child:
    from pennyweight.train import Trainee

    code = Trainee.optim_step.__code__
    child = world.train(description, before=lambda: stop_before(code, STOPPED_AFTER + 1))
    assert child.until(child.stopped), child.said
    act()
    child.send(signal.SIGCONT)
    return child


def _data_gone_on_the_way(world: World, description: Path, expected: str) -> str | None:
    """What was read is kept: the run ends as if nothing was."""
    child = _at_the_fourth_step(world, description, (world.folder / "rows.jsonl").unlink)
    return _ended(child, DONE) or _same(description, expected)


def _data_changed_on_the_way(world: World, description: Path, expected: str) -> str | None:
    child = _at_the_fourth_step(world, description, lambda: _one_letter(world.folder))
    fault = _ended(child, DONE) or _same(description, expected)
    return fault or _ended(world.train(description), USAGE, "rows.jsonl: the checkpoint was made")


def _cache_gone_on_the_way(world: World, description: Path, expected: str) -> str | None:
    cache = world.folder / "cache"
    child = _at_the_fourth_step(world, description, lambda: shutil.rmtree(cache))
    return _ended(child, DONE) or _same(description, expected)


def _data_changed_while_read(world: World, description: Path, expected: str) -> str | None:
    from pennyweight.data import dataset

    shutil.rmtree(world.folder / "cache", ignore_errors=True)
    child = world.train(description, before=lambda: stop_before(dataset.read.__code__, 1))
    assert child.until(child.stopped), child.said
    _one_letter(world.folder)
    child.send(signal.SIGCONT)
    fault = _ended(child, DATA, "rows.jsonl: changed while it was read")
    write_rows(world.folder / "rows.jsonl")
    return fault or world.ends_the_same(description, expected)


def _clock_goes_back(world: World, description: Path, expected: str) -> str | None:
    """Every process sees a clock a day behind the one before it, which also ran backwards."""
    for back_s in (0.0, 86400.0):
        _stop_with(world, description, 1 if back_s == 0.0 else 2, partial(_set_back, back_s))
    child = world.train(description, before=partial(_set_back, 2 * 86400.0))
    return _ended(child, DONE) or _same(description, expected)


def _stop_with(world: World, description: Path, steps: int, before: Callable[[], object]) -> None:
    from pennyweight.train import Trainee

    def both() -> None:
        before()
        stop_before(
            Trainee.optim_step.__code__,
            steps,
            then=lambda: os.kill(os.getpid(), signal.SIGTERM),
        )

    child = world.train(description, before=both)
    assert child.wait() == INTERRUPTED, child.said


def _set_back(back_s: float) -> None:
    """In the child: a clock that starts so far behind and runs backwards."""
    import datetime

    import pennyweight.report.log as log

    real, began = time.time, time.time()

    def now() -> float:
        return began - back_s - (real() - began)

    class Backwards(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime.fromtimestamp(now(), tz)

    time.time = now
    log.datetime = Backwards


def _file_times_lie(world: World, description: Path, expected: str) -> str | None:
    """The older a checkpoint, the newer its files say they are."""
    _stop(world, description)
    checkpoints = sorted((description.with_suffix("") / "checkpoints").glob("step-*"), reverse=True)
    for age, place in enumerate(checkpoints):
        for path in (place, *place.iterdir()):
            os.utime(path, (2e9 + age * 1e6, 2e9 + age * 1e6))
    return world.ends_the_same(description, expected)


def _two_runs_in_one_folder(world: World, description: Path, expected: str) -> str | None:
    """The second is refused, the first's process named, and the first ends as if nothing was."""
    second: list[str | None] = []

    def start_another() -> None:
        other = Child(["train", str(description)], world.folder / "other.said")
        second.append(_ended(other, USAGE, f"process {first_pid()} on "))

    def first_pid() -> int:
        owner: int = json.loads((description.with_suffix("") / "run.lock").read_text())["pid"]
        return owner

    child = _at_the_fourth_step(world, description, start_another)
    return second[0] or _ended(child, DONE) or _same(description, expected)


def _many_at_once(world: World, description: Path, expected: str) -> str | None:
    """Of eight commands started together one runs, seven are refused."""
    several = [
        Child(["train", str(description)], world.folder / f"several-{i}.said") for i in range(8)
    ]
    codes = sorted(child.wait() for child in several)
    if codes.count(DONE) != 1 or codes.count(USAGE) != 7:
        return f"ended with {codes}"
    return _same(description, expected)


def _owner_killed(world: World, description: Path, expected: str) -> str | None:
    child = _at_the_fourth_step(world, description, lambda: None)
    child.send(signal.SIGKILL)
    child.wait()
    return world.ends_the_same(description, expected)


def _same(description: Path, expected: str) -> str | None:
    return None if bits(description.with_suffix("")) == expected else "ended with other bits"
