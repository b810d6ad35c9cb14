"""The write protocol under kills, full disks and flipped bits; the rule of what is loaded and kept.

Kills come from a profiler that Python calls before every built-in function: a forked child kills
itself before the n-th that touches the disk, for every n. `strace` kills inside a system call.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from pennyweight.errors import ConfigError, DiskError, DivergedError
from pennyweight.train.checkpoint import (
    CheckpointState,
    load_latest,
    load_step,
    require_same,
    retire,
    save,
    steps_in,
    tidy,
)

# Built-in functions that write, and so find a full disk; and those that touch it in any way.
WRITES = {"mkdir", "open", "write", "flush", "fsync", "rename", "serialize_file", "close"}
TOUCHES = WRITES | {"unlink", "rmdir", "scandir", "listdir", "lstat", "stat", "read", "readinto"}


def state(step: int, *, size: int = 40) -> CheckpointState:
    generator = torch.Generator().manual_seed(step)
    return CheckpointState(
        step,
        {
            "parameter/a": torch.randn(size, generator=generator),
            "random/cpu": torch.get_rng_state(),
        },
        {"epoch": 1, "best_loss": 0.1 + 0.2, "limit_tokens": None},
        {"data": "abc", "adapter.r": "8"},
    )


def assert_holds(folder: Path, step: int) -> None:
    loaded = load_latest(folder)
    assert loaded is not None
    found, expected = loaded[0], state(step)
    assert found.step == step
    assert (found.progress, found.identity) == (expected.progress, expected.identity)
    assert torch.equal(found.tensors["parameter/a"], expected.tensors["parameter/a"])


def test_what_is_saved_is_loaded_and_durable_names_are_left(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none") is None
    place = save(tmp_path / "checkpoints", state(120))
    assert place == tmp_path / "checkpoints" / "step-000120"
    assert sorted(p.name for p in place.iterdir()) == [
        "MANIFEST.json",
        "progress.json",
        "state.safetensors",
    ]
    assert_holds(place.parent, 120)


def test_the_order_of_writes_is_the_promised_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spy(name: str, real: Callable[..., Any], subject: Callable[..., str]) -> None:
        def called(*arguments: Any) -> Any:
            seen.append(f"{name} {subject(*arguments)}")
            return real(*arguments)

        monkeypatch.setattr(os, name, called)

    spy("fsync", os.fsync, lambda number: Path(f"/proc/self/fd/{number}").readlink().name)
    spy("rename", os.rename, lambda a, b: Path(b).name)
    save(tmp_path / "c", state(3))
    assert seen == [
        f"fsync {tmp_path.name}",
        "fsync state.safetensors",
        "fsync progress.json",
        "fsync MANIFEST.json",
        "fsync .saving-step-000003",
        "rename step-000003",
        "fsync c",
    ]


def in_child(act: Callable[[], None], before_call: Callable[[str], None]) -> int:
    """Run `act` in a fork; `before_call` hears the name of each built-in before it is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads; the child starts none
        child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]

    def profiler(_frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            before_call(called.__name__)

    try:
        sys.setprofile(profiler)
        act()
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, this system has none")
@pytest.mark.parametrize("again", [False, True], ids=["new", "replaced"])
def test_a_kill_before_any_call_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, again: bool
) -> None:
    kept = tmp_path / "kept"
    save(kept, state(1))
    if again:
        save(kept, state(2))
    folder = tmp_path / "checkpoints"
    for point in range(1, 10_000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        left = point

        def kill(name: str) -> None:
            nonlocal left
            left -= name in TOUCHES
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def act() -> None:
            save(folder, state(2))
            retire(folder, keep=1)

        status = in_child(act, kill)
        loaded = load_latest(folder)
        assert loaded is not None, f"call {point}"
        assert loaded[0].step in (2,) if again else (1, 2)
        if status == 0:
            break
        tidy(folder)
        assert_holds(folder, loaded[0].step)
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert point > 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, this system has none")
def test_a_full_disk_at_any_call_loses_nothing_and_leaves_no_litter(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, state(1))
    told = tmp_path / "told"
    for point in range(1, 1000):
        left = point
        told.unlink(missing_ok=True)

        def fail(name: str) -> None:
            nonlocal left
            left -= name in WRITES
            if left == 0 and name in WRITES:
                sys.setprofile(None)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def act() -> None:
            try:
                save(folder, state(2))
            except DiskError as fault:
                told.write_text(str(fault))

        in_child(act, fail)
        if not told.exists():
            assert_holds(folder, 2)
            break
        assert "No space left on device" in told.read_text()
        assert "run the same command again" in told.read_text()
        assert not [p for p in folder.iterdir() if p.name.startswith(".saving")]
        if steps_in(folder) == [2, 1]:  # renamed, and not known to be durable
            shutil.rmtree(folder / "step-000002")
        assert_holds(folder, 1)
    assert point > 12


STRACED = """
import sys, torch
from pathlib import Path
from pennyweight.train.checkpoint import CheckpointState, save
Path(sys.argv[1], 'ready').touch()
save(Path(sys.argv[1], 'c'), CheckpointState(2, {'a': torch.zeros(9)}, {}, {}))
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, it is not installed")
def test_a_kill_inside_a_system_call(tmp_path: Path) -> None:
    save(tmp_path / "c", state(1))
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync"]
    command += ["-e", "inject=fsync:signal=KILL:when=4", sys.executable, "-c", STRACED]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, check=False, timeout=300)
    if not (tmp_path / "ready").exists():
        pytest.skip(f"strace cannot trace here: {done.stderr.decode()[-200:]}")
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert (tmp_path / "c" / ".saving-step-000002").is_dir()
    assert_holds(tmp_path / "c", 1)


def damages(place: Path, draw: random.Random) -> str:
    """Flip a bit of, cut, or empty one file of the checkpoint; or take it away, or swap two."""
    files = sorted(place.iterdir())
    path = draw.choice(files)
    kind = draw.choice(["flip", "flip", "flip", "cut", "grow", "empty", "remove", "swap"])
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        content = content[: draw.randrange(len(content))]
    elif kind == "grow":
        content += b"\n"
    elif kind == "empty":
        content = bytearray()
    path.write_bytes(content)
    if kind == "remove":
        path.unlink()
    if kind == "swap":
        other = draw.choice([f for f in files if f != path])
        path.rename(place / "x")
        other.rename(path)
        (place / "x").rename(other)
    return f"{kind} {path.name}"


def test_damage_is_caught_said_and_passed_over(tmp_path: Path) -> None:
    draw = random.Random(0)
    kept = tmp_path / "kept"
    folder = tmp_path / "checkpoints"
    save(kept, state(1))
    save(kept, state(2))
    for _ in range(300):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        done = damages(folder / "step-000002", draw)
        loaded = load_latest(folder)
        assert loaded is not None
        assert loaded[0].step == 1, done
        assert len(loaded[1]) == 1
        assert "step-000002" in loaded[1][0]


def test_a_file_that_was_not_written_with_it_is_caught(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, state(step))
    (tmp_path / "step-000002" / ".DS_Store").touch()  # a desktop's, no harm
    assert_holds(tmp_path, 2)
    (tmp_path / "step-000002" / "optimizer.pt").touch()
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded[0].step == 1
    assert "step-000002: optimizer.pt was not written with it" in loaded[1][0]


def test_what_was_to_be_replaced_is_put_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, state(2))
    rename, renamed = os.rename, []

    def fails_once(a: str, b: str) -> None:
        renamed.append(b)
        if len(renamed) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(a, b)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(DiskError, match="No space left"):
        save(tmp_path, state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]
    assert_holds(tmp_path, 2)


def test_a_named_step_is_that_one_or_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, state(step))
    assert load_step(tmp_path, 1).step == 1
    (tmp_path / "step-000001" / "MANIFEST.json").write_text("{}")
    with pytest.raises(DiskError, match="step-000001"):
        load_step(tmp_path, 1)
    with pytest.raises(DiskError, match="step-000003"):
        load_step(tmp_path, 3)


def test_a_checkpoint_under_another_name_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    save(tmp_path, state(2)).rename(tmp_path / "step-000009")
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded[0].step == 1
    assert "holds step 2" in loaded[1][0]


def test_nothing_whole_is_said_and_not_begun_anew(tmp_path: Path) -> None:
    (save(tmp_path, state(1)) / "MANIFEST.json").unlink()
    with pytest.raises(DiskError, match="no checkpoint is whole"):
        load_latest(tmp_path)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, state(2))
    (tmp_path / "step-000002" / "MANIFEST.json").write_text("{}")
    save(tmp_path, state(2))
    assert_holds(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_retirement_keeps_the_newest_the_best_and_what_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, state(step))
    (tmp_path / "step-000005" / "MANIFEST.json").write_text("{}")
    removed = retire(tmp_path, keep=1, best=2)
    assert sorted(path.name for path in removed) == ["step-000001", "step-000003"]
    assert steps_in(tmp_path) == [5, 4, 2]
    assert_holds(tmp_path, 4)


def test_what_a_kill_left_is_tidied(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    for name in (".saving-step-000002", ".retired-step-000001", ".replaced-step-000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    (tmp_path / ".mine").mkdir()
    assert len(tidy(tmp_path)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine", "step-000001"]


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    broken = state(1)
    broken.tensors["parameter/a"][3] = torch.nan
    with pytest.raises(DivergedError, match="parameter/a"):
        save(tmp_path / "c", broken)
    assert not (tmp_path / "c").exists()


def test_a_changed_run_is_refused_with_every_difference() -> None:
    saved = {"adapter.r": "8", "data": "abc", "base": "f00"}
    require_same(saved, dict(saved))
    with pytest.raises(ConfigError) as caught:
        require_same(saved, {"adapter.r": "16", "data": "abd", "base": "f00", "extra": "1"})
    assert str(caught.value).splitlines() == [
        "adapter.r: the checkpoint was made with 8, this run has 16",
        "data: the checkpoint was made with abc, this run has abd",
        "extra: the checkpoint was made with nothing, this run has 1",
        "a resumed run must be the same run: undo the change, or name another output_dir",
    ]


def test_no_pickle_is_read_or_written(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    seen: list[str] = []
    sys.addaudithook(lambda name, _: seen.append(name) if name.startswith("pickle") else None)
    load_latest(tmp_path)
    save(tmp_path, state(2))
    assert seen == []
