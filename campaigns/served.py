"""A small true server under test: two jobs, a client, what it acknowledged, what its jobs came to."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from campaigns.server import Server, warm_server
from campaigns.small_run import build_model
from campaigns.tally import Absent, Tally

__all__ = [
    "ENDED",
    "Acknowledged",
    "asked_of",
    "events_of",
    "idempotency",
    "job_of",
    "need_server",
    "outcome_of",
    "rows",
    "two_jobs",
]

STEPS = 12
GONE = (OSError, http.client.HTTPException)
ENDED = ("succeeded", "failed", "cancelled")


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


def asked_of(seed: int, file: str, held: str | None = None, **train: Any) -> dict[str, Any]:
    return {
        "model": "base",
        "training_file": file,
        "validation_file": held,
        "seed": seed,
        "lora": {"r": 4, "lora_dropout": 0.1},
        "hyperparameters": {"batch_size": 4},
        "train": {
            "max_steps": STEPS,
            "save_steps": 2,
            **({} if held is None else {"eval_steps": 4}),
            "learning_rate": 1e-2,
            **train,
        },
    }


def need_server() -> None:
    from importlib.util import find_spec

    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise Absent("the server's extra is not installed (pip install -e .[serve])")
    warm_server()


def job_of(server: Server, job_id: str) -> dict[str, Any]:
    status, job = server.ask("GET", f"/fine_tuning/jobs/{job_id}")
    assert status == 200, job
    found: dict[str, Any] = job
    return found


def events_of(server: Server, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    more = True
    while more:
        after = f"&after={found[-1]['id']}" if found else ""
        status, page = server.ask("GET", f"/fine_tuning/jobs/{job_id}/events?limit=100{after}")
        assert status == 200, page
        found += page["data"]
        more = page["has_more"]
    return found[::-1]


def outcome_of(server: Server, job_id: str) -> dict[str, Any]:
    """All of an ended job that does not depend on the clock or on its own name."""
    job = job_of(server, job_id)
    told = [e["data"] for e in events_of(server, job_id) if e["type"] == "metrics"]
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


def two_jobs(server: Server) -> list[str]:
    """Two jobs, each acknowledged."""
    ids = []
    for seed in (1, 2):
        file = server.upload(rows(26, f" {seed}"))
        held = server.upload(rows(3, " held out"))
        status, job = server.ask("POST", "/fine_tuning/jobs", asked_of(seed, file, held))
        assert status == 200, job
        ids.append(str(job["id"]))
    return ids


@dataclass
class Acknowledged:
    """What a server has said yes to, and what it said of chat. One client at a time writes."""

    files: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, bool] = field(default_factory=dict)  # whether a cancel was acknowledged
    asked: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)

    def lost(self, server: Server, *, all_of_it: bool = False) -> list[str]:
        """What of it is not there any more, of the newest or of all; chat billed twice or not at all."""
        lost, self.wrong = self.wrong, []
        newest = 0 if all_of_it else -3
        for file, content in list(self.files.items())[newest:]:
            found = server.ask("GET", f"/files/{file}/content")[1]
            if not isinstance(found, bytes) or found != content:
                lost.append(file)
        for job, cancelled in list(self.jobs.items())[newest:]:
            status, found = server.ask("GET", f"/fine_tuning/jobs/{job}")
            if status != 200 or (cancelled and found["status"] != "cancelled"):
                lost.append(job)
        billed = server.ask("GET", "/usage")[1]["total"]["requests"]
        if not self.answered <= billed <= self.asked:
            lost.append(f"{self.answered} to {self.asked} answers are billed as {billed}")
        return lost

    @contextmanager
    def client(self, server: Server) -> Iterator[None]:
        """Meanwhile somebody chats, uploads rows once, and creates a job that is cancelled at once."""
        end = threading.Event()

        def act() -> None:
            try:
                self._chat(server)
                self._change_their_mind(server)
                while not end.is_set():
                    self._chat(server)
            except GONE:
                pass  # killed, and what was under way with it

        thread = threading.Thread(target=act)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def _chat(self, server: Server) -> None:
        said = [{"role": "user", "content": "say red"}]
        body = {"model": "base", "messages": said, "max_tokens": 16}
        self.asked += 1
        status, found = server.ask("POST", "/chat/completions", body)
        self.answered += status == 200
        if status not in (200, 503):
            self.wrong.append(f"chat is answered with {status}: {found}")

    def _change_their_mind(self, server: Server) -> None:
        content = rows(2, f" {len(self.files)}")
        file = server.upload(content)
        self.files[file] = content
        status, job = server.ask("POST", "/fine_tuning/jobs", asked_of(0, file, max_steps=1))
        if status == 200:
            self.jobs[job["id"]] = False
            status, _ = server.ask("POST", f"/fine_tuning/jobs/{job['id']}/cancel")
            self.jobs[job["id"]] = status == 200


def idempotency(tally: Tally, cases: int | None) -> None:
    """The same request with one Idempotency-Key, fifty at once: one job."""
    need_server()
    build_model(tally.folder / "model")
    with Server(tally.folder / "data", str(tally.folder / "model"), forked=True) as server:
        file = server.upload(rows(8, ""))
        for case in range(cases or 20):
            body = asked_of(case, file, max_steps=1, save_steps=1)
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
