"""Programs measured in turn, each in processes of its own: A B B A A B, so that a machine that slows
down or warms up is unfair to none. A child prints its answer as the last line of its output, in JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Answer", "ask", "median", "peak_bytes", "spread", "turns"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child said; the most memory that it and its own children held together, in bytes (PSS:
    what processes share is counted once); its seconds, start and end included; `fault`: its last
    words where it failed.
    """

    said: dict[str, Any]
    peak_bytes: int
    seconds: float
    fault: str = ""


def turns(sides: Sequence[str], rounds: int) -> Iterator[str]:
    """Each side `rounds` times: forth, back, forth, ..."""
    for number in range(rounds):
        yield from sides if number % 2 == 0 else reversed(sides)


def ask(
    module: str,
    words: Sequence[str],
    *,
    timeout_s: float,
    answers: bool = True,
    **environment: str,
) -> Answer:
    """Run `python -m module words...` and take its answer, if it gives one; no more than `timeout_s`."""
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", module, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **environment},
        cwd=Path(__file__).resolve().parents[1],
    )
    watch = _Watch(child.pid)
    watch.start()
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        err += f"\nstopped after {timeout_s:.0f} s"
    finally:
        watch.ended.set()
        watch.join()
    seconds = time.perf_counter() - began
    lines = out.strip().splitlines()
    if child.returncode == 0 and (lines or not answers):
        return Answer(json.loads(lines[-1]) if answers else {}, watch.most, seconds)
    words_of_fault = (err.strip() or out.strip()).splitlines() or ["said nothing"]
    return Answer({}, watch.most, seconds, words_of_fault[-1][:200])


def peak_bytes() -> int:
    """The high-water mark of this process's resident memory, in bytes; 0 where the system has none."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Half the distance between the largest and the smallest, as a share of the median."""
    return (max(values) - min(values)) / 2 / statistics.median(values)


class _Watch(threading.Thread):
    """Looks at the memory of a process and its descendants every 0.4 s: oftener would slow them down."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self._root, self.most, self.ended = root, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.4):
            self.most = max(self.most, sum(map(_pss, _descendants(self._root))))


def _descendants(root: int) -> list[int]:
    found = [root]
    for pid in found:
        for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, tasks.read_text().split())
            except OSError:
                continue  # it ended meanwhile
    return found


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
