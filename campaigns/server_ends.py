"""How jobs and servers end when they are asked to: a cancel within a step, SIGTERM within its time."""

from __future__ import annotations

import random
import time
from pathlib import Path

from campaigns.clock import running_s, until
from campaigns.served import Acknowledged, asked_of, events_of, need_server, outcome_of, rows
from campaigns.server import Server
from campaigns.small_run import build_model
from campaigns.tally import Tally

__all__ = ["run"]

CANCELS, DRAINS = 50, 50
DRAINS_WITHIN_S = 30.0


def run(tally: Tally, cases: int | None) -> None:
    """A job is cancelled at a random instant, every second one in training: within a step or two seconds nothing more is trained,
    and what it made is billed. And SIGTERM at a random instant: the server ends by itself, in time,
    and the next one goes on.
    """
    need_server()
    build_model(tally.folder / "model")
    draw = random.Random(0)
    server = Server(tally.folder / "data", str(tally.folder / "model"), forked=True)
    with server:
        file = server.upload(rows(26, ""))
        late_s = [
            _cancelled(tally, server, file, draw, begun=number % 2 == 0)
            for number in range(cases or CANCELS)
        ]
        tally.remark(f"at most {max(late_s):.2f} s from a cancel to the last step")
        took_s = _drained(tally, server, file, draw, cases or DRAINS)
        tally.remark(f"at most {took_s:.2f} s from SIGTERM to the end")


def _cancelled(
    tally: Tally, server: Server, file: str, draw: random.Random, *, begun: bool
) -> float:
    """One job cancelled, once its first step is taken where it shall have `begun`; how long after it
    was asked the last step was logged.
    """
    asked = asked_of(draw.randrange(1000), file, max_steps=100_000, save_steps=50)
    _, job = server.ask("POST", "/fine_tuning/jobs", asked)
    log = server.data_dir / "jobs" / job["id"] / "events.jsonl"
    if begun:
        until(lambda: _steps(log) > 0, 60)
    time.sleep(draw.uniform(0.0, 0.5 if begun else 1.0))
    began = running_s()
    status, _ = server.ask("POST", f"/fine_tuning/jobs/{job['id']}/cancel")
    acknowledged = _steps(log)
    late_s = max(0.0, _silence(log) - began)
    made = _steps(log)
    fault = None if status == 200 else f"answered {status}"
    if late_s > 2 and made > acknowledged + 1:
        fault = f"trained on for {late_s:.2f} s, {made - acknowledged} steps"
    fault = fault or _unpaid(server, job["id"], made)
    tally.case(f"cancel {tally.tried + 1}, after {made} steps", fault)
    return late_s


def _unpaid(server: Server, job_id: str, made: int) -> str | None:
    """What is wrong with a cancelled job that made so many steps."""

    def told() -> list[int]:
        return [e["data"]["step"] for e in events_of(server, job_id) if "train_loss" in e["data"]]

    if not until(lambda: told() == list(range(1, made + 1)), 10):
        return f"{made} steps were made, and told are {told()}"
    found = outcome_of(server, job_id)
    if found["status"] != "cancelled":
        return f"is {found['status']}"
    tokens = sum(each["tokens"] for each in found["metrics"])
    if not sum(found["billed"]) == tokens == (found["trained_tokens"] or 0):
        return f"{tokens} tokens were trained, and billed are {found['billed']}"
    return None


def _drained(tally: Tally, server: Server, file: str, draw: random.Random, count: int) -> float:
    """SIGTERM again and again to a server that trains one job and answers; the longest it took."""
    asked = asked_of(1, file, max_steps=100_000, save_steps=50)
    _, job = server.ask("POST", "/fine_tuning/jobs", asked)
    known = Acknowledged(jobs={job["id"]: False})
    log = server.data_dir / "jobs" / job["id"] / "events.jsonl"
    longest_s, before = 0.0, 0
    for number in range(1, count + 1):
        lost, for_s = list[str](), draw.uniform(0.0, 1.5)
        end = running_s() + for_s
        if serving := until(server.serves, for_s, every_s=0.002):
            lost = known.lost(server)
            with known.client(server):
                until(lambda end=end: running_s() > end, for_s)  # type: ignore[misc]
                took_s, code = _stopped(server)
        else:
            until(server.hears, DRAINS_WITHIN_S, every_s=0.001)
            took_s, code = _stopped(server)
        longest_s = max(longest_s, took_s)
        if code not in ((0,) if serving else (0, 75)):
            lost.append(f"ended with {code}: {server.said()[-300:]}")
        if (made := _steps(log)) < before:
            lost.append(f"{before} steps were made, and {made} are left")
        before = made
        tally.case(f"SIGTERM {number}", ", ".join(lost) or None)
        server.spawn()
    server.kill()
    server.start()
    server.ask("POST", f"/fine_tuning/jobs/{job['id']}/cancel")
    _silence(log)
    known.jobs[job["id"]] = True
    fault = _unpaid(server, job["id"], _steps(log)) or ", ".join(known.lost(server, all_of_it=True))
    tally.case("the job of all servers", fault or None)
    return longest_s


def _stopped(server: Server) -> tuple[float, int | str]:
    """SIGTERM: how long the server took to end, and its exit code."""
    began = running_s()
    try:
        code: int | str = server.stop(DRAINS_WITHIN_S)
    except TimeoutError:
        code = f"nothing within {DRAINS_WITHIN_S:.0f} s"
    return running_s() - began, code


def _steps(log: Path) -> int:
    return log.read_text().count('"kind": "step"') if log.exists() else 0


def _silence(log: Path) -> float:
    """When the log of a run was last written to, once it is quiet."""
    last, at = -1, running_s()
    while running_s() - at < 0.4:
        size = log.stat().st_size if log.exists() else 0
        if size != last:
            last, at = size, running_s()
        time.sleep(0.005)
    return at
