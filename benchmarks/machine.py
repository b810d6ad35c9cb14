"""What a table must say of where it was made: machine, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["circumstances", "commit", "cpu_model", "in_words"]


def cpu_model() -> str:
    """The processor's own name, with the instruction set that matters for numbers."""
    info = Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    import torch

    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """The commit measured, marked where files of the package or the benchmarks differ from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def circumstances(packages: Sequence[str]) -> dict[str, object]:
    """Everything a reader needs to repeat a measurement, ready for JSON."""
    import torch

    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "system": platform.system(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def in_words(facts: dict[str, object]) -> str:
    """One line of it for under a table."""
    versions = facts["versions"]
    assert isinstance(versions, dict)
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{facts['date']}, commit {facts['commit']}; {facts['cpu']}, {facts['cores']} cores, "
        f"{facts['threads']} thread(s) a process, {facts['system']}; {said}."
    )
