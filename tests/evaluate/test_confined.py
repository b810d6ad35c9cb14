"""Programs end within their limits, and only one that ran to its end has passed."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pennyweight.errors import ConfigError
from pennyweight.evaluate.tasks import confined
from pennyweight.evaluate.tasks.confined import Confinement, find_confinement, run_confined
from pennyweight.evaluate.tasks.programs import judged_apart, pass_at_k, program_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs are limited on POSIX only")


@pytest.fixture(scope="module")
def confinement() -> Confinement:
    return find_confinement()


def test_a_sound_program_passes(confinement: Confinement) -> None:
    verdict = run_confined("import math, re, hashlib\nassert math.comb(5, 2) == 10", confinement)
    assert verdict.passed, verdict
    assert "no file written" in confinement.holds


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "killed"),
        ("import os\nfor fd in range(3, 60):\n try: os.write(fd, b'{\"passed\": true}')\n except OSError: pass\nos._exit(0)", "killed"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)  # fmt: skip
def test_leaving_early_is_no_success(confinement: Confinement, program: str, why: str) -> None:
    verdict = run_confined(program, confinement)
    assert (verdict.passed, verdict.why) == (False, why)


@pytest.mark.parametrize(
    "deed",
    [
        "open('left', 'w')",
        "open({target!r}, 'a').write('x')",
        "import os; os.remove({target!r})",
        "import os; os.open({target!r}, os.O_WRONLY | os.O_TRUNC)",
        "import shutil; shutil.rmtree({folder!r})",
        "import pathlib; pathlib.Path({target!r}).unlink()",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import os; os.kill({pid}, 0)",
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import ctypes; ctypes.CDLL(None)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))",
    ],
)
def test_what_no_test_needs_is_refused(confinement: Confinement, tmp_path: Path, deed: str) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    target.chmod(0o666)
    tmp_path.chmod(0o777)
    program = deed.format(target=str(target), folder=str(tmp_path), pid=os.getpid())
    verdict = run_confined(program, confinement)
    assert not verdict.passed
    assert verdict.why in {"PermissionError", "ImportError", "OSError"}, verdict
    assert target.read_text() == "kept"


def test_it_stands_in_an_empty_folder_without_our_environment(
    confinement: Confinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = (
        "import os, sys\n"
        "assert 'HF_TOKEN' not in os.environ\n"
        "assert 'pennyweight' not in sys.modules\n"
        "assert os.path.basename(os.getcwd()).startswith('pennyweight-')\n"
        "assert os.geteuid() != 0\n"
    )
    verdict = run_confined(program, confinement)
    assert verdict.passed, verdict


def test_time_runs_out_by_the_clock_and_by_the_processor(
    confinement: Confinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confined, "WALL_S", 1.0)
    begun = time.monotonic()
    verdict = run_confined("import time; time.sleep(60)", confinement)
    assert (verdict.passed, verdict.why) == (False, "timeout")
    assert time.monotonic() - begun < 20
    monkeypatch.setattr(confined, "WALL_S", 60.0)
    monkeypatch.setitem(confined.LIMITS, "CPU", 1)
    verdict = run_confined("while True: pass", confinement)
    assert (verdict.passed, verdict.why) == (False, "killed")


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_nothing_lives_on(confinement: Confinement, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def noted(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(confined.subprocess, "Popen", noted)
    monkeypatch.setattr(confined, "WALL_S", 1.0)
    assert run_confined("import time; time.sleep(60)", confinement).why == "timeout"
    deadline = time.monotonic() + 10  # who was killed is gone when the kernel gets to it
    while _lives(started[0].pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_where_nothing_holds_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "SOUND", "raise ValueError")
    with pytest.raises(ConfigError, match="not even a sound program runs within limits"):
        find_confinement()


def test_pass_at_k_is_the_chance_of_drawing_a_right_one() -> None:
    assert pass_at_k(0, 5, 1) == 0
    assert pass_at_k(2, 5, 1) == pytest.approx(2 / 5)
    assert pass_at_k(1, 3, 2) == pytest.approx(2 / 3)
    assert pass_at_k(4, 5, 2) == 1


def test_the_judge_runs_the_problems_own_tests(
    confinement: Confinement, problem: dict[str, Any]
) -> None:
    config = {"metric_list": [{"metric": "theirs", "k": [1, 2]}]}
    judged = judged_apart(config, confinement)
    completions = ["    return 2 * x\n", "    return x * x\n", "    return x + x"]
    found = judged["process_results"](problem, [completions])
    assert found == {"pass@1": pytest.approx(2 / 3), "pass@2": 1.0}
    read = judged["filter_list"][0]["filter"][0]["filter_fn"]
    assert read([["    return 1\n```\nwords"]], [problem]) == [["    return 1\n```\nwords"]]
    fenced = judged_apart({**config, "gen_prefix": "```python\n"}, confinement)
    read = fenced["filter_list"][0]["filter"][0]["filter_fn"]
    assert read([["    return 1\n```\nwords"]], [problem]) == [["    return 1\n"]]


def test_humanevals_own_solutions_pass_and_empty_ones_do_not(
    confinement: Confinement, shared_data: Path
) -> None:
    text = gzip.decompress((shared_data / "eval/humaneval/HumanEval.jsonl.gz").read_bytes())
    problems = [json.loads(line) for line in text.splitlines()]
    assert len(problems) == 164
    for problem in problems[::4]:
        verdict = run_confined(program_of(problem, problem["canonical_solution"]), confinement)
        assert verdict.passed, (problem["task_id"], verdict)
    for problem in problems[::20]:
        assert not run_confined(program_of(problem, "    pass\n"), confinement).passed
