"""What is promised of a server: kills, cancels, one job a key, isolated adapters, hostile requests."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaigns.server import Server, warm_server
from campaigns.small_run import build_model
from campaigns.tally import Absent, Tally

__all__ = ["cancels", "idempotency", "kills"]

CANCELS, KILLS = 50, 200
STEPS = 12
GONE = (OSError, http.client.HTTPException)


def rows(count: int, salt: str) -> bytes:
    """Chat rows of a few words, all different."""
    words = ("red", "green", "blue", "one", "two", "three", "cat", "dog")
    lines = []
    for i in range(count):
        a, b = words[i % 8], words[(i // 8 + i) % 8]
        turns = [
            {"role": "user", "content": f"say {a} and {b} {i}{salt}"},
            {"role": "assistant", "content": f"{b} {a} " * (1 + i % 3)},
        ]
        lines.append(json.dumps({"messages": turns}).encode() + b"\n")
    return b"".join(lines)


def _asked(seed: int, file: str, held: str | None = None, **train: Any) -> dict[str, Any]:
    return {
        "model": "base",
        "training_file": file,
        "validation_file": held,
        "seed": seed,
        "lora": {"r": 4, "lora_dropout": 0.1},
        "hyperparameters": {"batch_size": 4},
        "train": {"max_steps": STEPS, "save_steps": 2, "learning_rate": 1e-2, **train},
    }


def _need_server() -> None:
    from importlib.util import find_spec

    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise Absent("the server's extra is not installed (pip install -e .[serve])")
    warm_server()


def _job(server: Server, job_id: str) -> dict[str, Any]:
    status, job = server.ask("GET", f"/fine_tuning/jobs/{job_id}")
    assert status == 200, job
    found: dict[str, Any] = job
    return found


def _until(act: Callable[[], bool], longest_s: float) -> bool:
    end = time.monotonic() + longest_s
    while not act():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _events(server: Server, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    more = True
    while more:
        after = f"&after={found[-1]['id']}" if found else ""
        status, page = server.ask("GET", f"/fine_tuning/jobs/{job_id}/events?limit=100{after}")
        assert status == 200, page
        found += page["data"]
        more = page["has_more"]
    return found[::-1]


def _outcome(server: Server, job_id: str) -> dict[str, Any]:
    """All of an ended job that does not depend on the clock or on its own name."""
    job = _job(server, job_id)
    told = [e["data"] for e in _events(server, job_id) if e["type"] == "metrics"]
    for each in told:
        del each["device_seconds"]
    _, points = server.ask("GET", f"/fine_tuning/jobs/{job_id}/checkpoints")
    _, used = server.ask("GET", f"/usage?job={job_id}")
    folder = server.data_dir / "jobs" / job_id / "adapter" / "adapter_model.safetensors"
    return {
        "status": job["status"],
        "error": job["error"],
        "trained_tokens": job["trained_tokens"],
        "billed": [used["total"][name] for name in ("tokens_trained", "tokens_evaluated")],
        "metrics": told,
        "checkpoints": [point["step_number"] for point in points["data"]],
        "adapter": folder.read_bytes().hex() if folder.is_file() else None,
    }


def _two_jobs(server: Server) -> list[str]:
    """Two jobs, each acknowledged."""
    ids = []
    for seed in (1, 2):
        file = server.upload(rows(26, f" {seed}"))
        held = server.upload(rows(3, " held out"))
        status, job = server.ask("POST", "/fine_tuning/jobs", _asked(seed, file, held))
        assert status == 200, job
        ids.append(str(job["id"]))
    return ids


def _ended(server: Server, ids: list[str]) -> bool:
    return all(_job(server, each)["status"] in ("succeeded", "failed") for each in ids)


def kills(tally: Tally, cases: int | None) -> None:
    """Two jobs and chat, the server killed at random instants until both jobs have ended: then they
    are as if nothing had been, what is billed too. Between two kills a further job may be created.
    """
    _need_server()
    build_model(tally.folder / "model")
    base = str(tally.folder / "model")
    with Server(tally.folder / "calm", base, forked=True) as calm:
        began = time.monotonic()
        ids = _two_jobs(calm)
        assert _until(lambda: _ended(calm, ids), 300), calm.said()[-2000:]
        longest_s = 0.6 * (time.monotonic() - began)
        expected = [_outcome(calm, each) for each in ids]
        calm.stop()
    draw, done, chains = random.Random(0), 0, 0
    while done < (cases or KILLS):
        chains += 1
        server = Server(tally.folder / f"killed-{chains}", base, forked=True)
        server.start()
        ids = _two_jobs(server)
        acknowledged = {file["id"] for file in server.ask("GET", "/files")[1]["data"]}
        while True:
            fault = _killed_once(server, ids, acknowledged, draw.uniform(0.0, longest_s))
            if fault == "":
                break
            done += 1
            tally.case(f"kill {done} of chain {chains}", fault)
        for each, whole in zip(ids, expected, strict=True):
            found = _outcome(server, each)
            different = [name for name in whole if found[name] != whole[name]]
            if different:
                tally.case(f"chain {chains}", f"{each}: {', '.join(different)} differ")
        code = server.stop()
        if code != 0:
            tally.case(f"chain {chains}", f"the last server ended with {code}")
        shutil.rmtree(server.data_dir)
    tally.remark(f"{chains} times two jobs and chat")


def _killed_once(
    server: Server, ids: list[str], acknowledged: set[str], after_s: float
) -> str | None:
    """Kill the server after so long and start it again: what was lost, or None; "" where the jobs had
    ended before.
    """
    end = threading.Event()
    chats = threading.Thread(target=_chat, args=(server, end))
    chats.start()
    ended = _until(lambda: _ended(server, ids), after_s)
    end.set()
    if ended:
        chats.join()
        return ""
    server.kill()
    chats.join()
    server.start()
    missing = acknowledged - {file["id"] for file in server.ask("GET", "/files")[1]["data"]}
    lost = [each for each in ids if server.ask("GET", f"/fine_tuning/jobs/{each}")[0] != 200]
    return f"lost {[*missing, *lost]}" if missing or lost else None


def _chat(server: Server, end: threading.Event) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "say red"}], "max_tokens": 16}
    while not end.is_set():
        try:
            server.ask("POST", "/chat/completions", body, timeout_s=10)
        except GONE:
            time.sleep(0.02)


def cancels(tally: Tally, cases: int | None) -> None:
    """A job is cancelled at a random instant: within a step or two seconds nothing more is trained,
    and what it made is billed.
    """
    _need_server()
    build_model(tally.folder / "model")
    draw, longest_s = random.Random(0), 0.0
    with Server(tally.folder / "data", str(tally.folder / "model"), forked=True) as server:
        file = server.upload(rows(26, ""))
        for case in range(cases or CANCELS):
            asked = _asked(case, file, max_steps=100_000, save_steps=50)
            _, job = server.ask("POST", "/fine_tuning/jobs", asked)
            time.sleep(draw.uniform(0.0, 1.5))
            began = time.monotonic()
            status, _ = server.ask("POST", f"/fine_tuning/jobs/{job['id']}/cancel")
            log = server.data_dir / "jobs" / job["id"] / "events.jsonl"
            longest_s = max(longest_s, _silence(log) - began)
            time.sleep(0.3)
            found = _outcome(server, job["id"])
            made = _steps(log)
            told = sum(1 for each in found["metrics"] if "train_loss" in each)
            fault = None if status == 200 else f"answered {status}"
            if found["status"] != "cancelled":
                fault = f"is {found['status']}"
            if told != made:
                fault = f"{made} steps were made, {told} are told and billed"
            if sum(each["tokens"] for each in found["metrics"]) != (found["trained_tokens"] or 0):
                fault = "the bill is not that of its steps"
            tally.case(f"cancel {case + 1}", fault)
        if server.stop(30) != 0:
            tally.case("SIGTERM", "did not end well")
    if longest_s > 2:
        tally.case("the longest", f"trained on for {longest_s:.2f} s")
    tally.remark(f"the last step at most {max(0.0, longest_s):.2f} s after the cancel was asked")


def _steps(log: Path) -> int:
    return log.read_text().count('"kind": "step"') if log.exists() else 0


def _silence(log: Path) -> float:
    """When the log of a run was last written to, once it is quiet."""
    last, at = -1, time.monotonic()
    while time.monotonic() - at < 0.4:
        size = log.stat().st_size if log.exists() else 0
        if size != last:
            last, at = size, time.monotonic()
        time.sleep(0.005)
    return at


def idempotency(tally: Tally, cases: int | None) -> None:
    """The same request with one Idempotency-Key, fifty at once: one job."""
    _need_server()
    build_model(tally.folder / "model")
    with Server(tally.folder / "data", str(tally.folder / "model"), forked=True) as server:
        file = server.upload(rows(8, ""))
        for case in range(cases or 20):
            body = _asked(case, file, max_steps=1, save_steps=1)
            head = {"idempotency-key": f"case {case}"}

            def create(_: int, body: Any = body, head: Any = head) -> tuple[int, Any]:
                return server.ask("POST", "/fine_tuning/jobs", body, headers=head)

            with concurrent.futures.ThreadPoolExecutor(50) as pool:
                answers = list(pool.map(create, range(50)))
            found = {answer["id"] for status, answer in answers if status == 200}
            codes = sorted({status for status, _ in answers})
            fault = None if len(found) == 1 and codes == [200] else f"{len(found)} jobs, {codes}"
            tally.case(f"key {case}", fault)
        _, listed = server.ask("GET", "/fine_tuning/jobs?limit=100")
        if len(listed["data"]) != (cases or 20):
            tally.case("all keys", f"{len(listed['data'])} jobs")
        server.stop(60)
