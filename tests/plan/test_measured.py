"""The predicted peak against the resident memory of a fresh process that trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.plan_cpu import Case, measure

from pennyweight.plan import plan
from tests.plan.conftest import CPU, run_config

SCRIPT = Path(__file__).with_name("measure_run.py")
SHAPE = {"layers": 4, "hidden": 256, "intermediate": 704, "heads": 4, "kv_heads": 2, "vocab": 4096}

GIVES_BACK = ("MALLOC_MMAP_THRESHOLD_", "1048576")

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def marks(config: Any) -> dict[str, int]:
    """High-water marks of a process that trains two steps, in bytes.

    glibc keeps freed blocks under 32 MB for itself and cannot always use them again, which adds
    up to what the run itself takes; with a fixed threshold it gives each back.
    """
    given = {
        "config": config.model_dump(mode="json"),
        "tokens": config.data.max_length * config.train.batch_size,
        "documents": config.train.batch_size,
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | dict([GIVES_BACK]),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@linux
@pytest.mark.parametrize("case", [{"recompute": True, "documents": 2}], ids=str)
def test_resident_peak_within_a_tenth(
    sized_model: Any, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sized_model(**SHAPE)
    config = run_config(model.folder, tokens=2048, **case)
    found = marks(config)
    monkeypatch.setenv(*GIVES_BACK)
    predicted = plan(config, model.shapes, device=CPU)
    # What libraries take of a process depends on what the kernel has mapped; tensors do not.
    assert predicted.allocated_bytes + found["process"] == pytest.approx(found["trained"], rel=0.1)


@linux
@pytest.mark.parametrize(
    "case",
    [Case(256, 4, "qlora", 1024), Case(256, 4, "lora", 1024, recompute=True)],
    ids=lambda case: case.name,
)
def test_an_ordinary_run_takes_what_its_plan_said(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `python -m benchmarks.plan_cpu` finds on larger shapes: receipt beside receipt."""
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    found = measure(case, tmp_path)
    assert found.ratio == pytest.approx(1, abs=0.1)
