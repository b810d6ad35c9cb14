"""Silent corruption: bit flips, truncations, swapped, missing and extra files of a checkpoint.

Each case damages the newest checkpoint of a real run (every fourth time the one before it too); the
rule of loading must take the newest that is untouched and say what it passed over. Every hundredth
case runs the command again, which must say it in its receipt and end with the same bits.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from campaigns.small_run import STEPS
from campaigns.small_world import World
from campaigns.tally import Tally

__all__ = ["run"]

CASES, RUN_EVERY = 2000, 100


def run(tally: Tally, cases: int | None) -> None:
    world = World.made(tally.folder)
    description = world.describe("run", train__save_total_limit=3, train__save_steps=1)
    expected = world.whole(description)
    run_folder, kept = description.with_suffix(""), world.folder / "kept"
    run_folder.rename(kept)
    draw = random.Random(0)
    wanted = cases or CASES
    runs = 0
    for number in range(wanted):
        full = number % (RUN_EVERY if cases is None else max(1, wanted // 2)) == 0
        shutil.rmtree(run_folder, ignore_errors=True)
        if full:
            world.copy(kept, run_folder)
        else:
            world.copy(kept / "checkpoints", run_folder / "checkpoints")
        damaged = [STEPS] if number % 4 else [STEPS, STEPS - 1]
        done = [_damage(run_folder / "checkpoints" / f"step-{s:06d}", draw) for s in damaged]
        label = f"{number}: {', '.join(done)}"
        fault = _passed_over(run_folder, damaged)
        if fault is None and full:
            runs += 1
            fault = world.ends_the_same(description, expected) or _said_so(run_folder, damaged)
        tally.case(label, fault)
    tally.remark(f"{runs} of them by a whole run")


def _passed_over(run_folder: Path, damaged: list[int]) -> str | None:
    from pennyweight.errors import DiskError
    from pennyweight.train import load_latest

    try:
        found = load_latest(run_folder / "checkpoints")
    except DiskError as fault:
        return f"nothing was loaded: {fault}"
    assert found is not None
    state, passed_over = found
    if state.step in damaged:
        return f"the damaged checkpoint of step {state.step} was loaded"
    if state.step != STEPS - len(damaged):
        return f"step {state.step} was loaded, which is not the newest whole one"
    silent = [s for s in damaged if not any(f"step-{s:06d}" in why for why in passed_over)]
    return f"not said: {silent}" if silent else None


def _said_so(run_folder: Path, damaged: list[int]) -> str | None:
    notices = json.loads((run_folder / "receipt.json").read_text())["result"]["notices"]
    for step in damaged:
        if not any("not whole" in n and f"step-{step:06d}" in n for n in notices):
            return f"the receipt does not say that step {step} was passed over"
    return None


def _damage(place: Path, draw: random.Random) -> str:
    """One of the ways below; gives its name and what it met.

    Until something is another: a file of a checkpoint that was itself replaced may be the same.
    """
    before, done = _content(place), []
    while not done or _content(place) == before:
        done.append(draw.choice(DAMAGES)(place, draw))
    return "; ".join(done)


def _content(place: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in place.iterdir()}


def _flip(place: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(place.iterdir()))
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit} of {path.name} flipped"


def _flip_several(place: Path, draw: random.Random) -> str:
    return "; ".join(dict.fromkeys(_flip(place, draw) for _ in range(draw.randint(2, 9))))


def _cut(place: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(place.iterdir()))
    size = draw.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"{path.name} cut to {size} bytes"


def _zero(place: Path, draw: random.Random) -> str:
    """A block of zeros, as some disks give back what they lost; the size stays."""
    path = draw.choice(sorted(place.iterdir()))
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    length = min(len(content) - start, 512)
    if not any(content[start : start + length]):
        return _flip(place, draw)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    return f"{length} bytes of {path.name} zeroed"


def _grow(place: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(place.iterdir()))
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 64)))
    return f"{path.name} grown"


def _swap_within(place: Path, draw: random.Random) -> str:
    a, b = draw.sample(sorted(place.iterdir()), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return f"{a.name} and {b.name} swapped"


def _from_another(place: Path, draw: random.Random) -> str:
    """Some files, or all, of another checkpoint of the same run."""
    others = [p for p in place.parent.iterdir() if p.name.startswith("step-") and p != place]
    other = draw.choice(sorted(others))
    names = draw.sample(sorted(p.name for p in place.iterdir()), draw.randint(1, 3))
    for name in names:
        source = other / name
        if not source.is_file():
            return _remove(place, draw)
        shutil.copyfile(source, place / name)
    return f"{', '.join(names)} of {other.name}"


def _remove(place: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(place.iterdir()))
    path.unlink()
    return f"{path.name} removed"


def _add(place: Path, draw: random.Random) -> str:
    name = draw.choice(("optimizer.pt", "state.safetensors.1", ".hidden", "rng.pkl", "MANIFEST"))
    (place / name).write_bytes(draw.randbytes(draw.randrange(64)))
    return f"{name} added"


def _folder(place: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(place.iterdir()))
    path.unlink()
    path.mkdir()
    return f"{path.name} made a folder"


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (
    *(_flip,) * 4, _flip_several, *(_cut,) * 2, _zero, _grow, _swap_within, _from_another, _remove,
    _add, _folder,
)  # fmt: skip
