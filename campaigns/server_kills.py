"""A server killed at any instant, again and again: nothing acknowledged is lost, jobs end with the
same bits and are billed once, and nobody else writes to its folder.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from campaigns.children import Child
from campaigns.clock import running_s, until
from campaigns.served import ENDED, Acknowledged, job_of, need_server, outcome_of, two_jobs
from campaigns.server import Server
from campaigns.small_run import build_model
from campaigns.tally import Tally

__all__ = ["run"]

KILLS = 200


def run(tally: Tally, cases: int | None) -> None:
    """Two jobs and a client, the server killed at random instants until both jobs have ended, and once
    more: then they are as if nothing had been, what is billed too.
    """
    need_server()
    build_model(tally.folder / "model")
    base = str(tally.folder / "model")
    began = running_s()
    with Server(tally.folder / "calm", base, forked=True) as calm:
        ids = two_jobs(calm)
        assert until(lambda: _stand(calm, ids) == "ended", 300), calm.said()[-2000:]
        longest_s = running_s() - began
        expected = [outcome_of(calm, each) for each in ids]
        calm.stop()
    for each in expected:
        assert each["status"] == "succeeded", each
    draw, seen, chains = random.Random(0), Counter[str](), 0
    wanted = cases or KILLS
    while sum(seen.values()) < wanted:
        chains += 1
        server = Server(tally.folder / f"killed-{chains}", base, forked=True)
        try:
            lives = _lives(draw, longest_s, lambda: sum(seen.values()) < wanted)
            _killed_until_ended(tally, server, lives, seen, expected)
        finally:
            server.kill()
        shutil.rmtree(server.data_dir)
    told = ", ".join(f"{count} {stand}" for stand, count in sorted(seen.items()))
    tally.remark(f"{chains} times two jobs and a client; killed while {told}")


def _lives(draw: random.Random, longest_s: float, more: Callable[[], bool]) -> Iterator[float]:
    """How long each server of a chain may live: longer with time, so that some come further than the
    last checkpoint in the end; as long as it likes once there are kills enough.
    """
    for life in itertools.count(8):
        yield draw.uniform(0.0, longest_s * life / 8) if more() else math.inf


def _killed_until_ended(
    tally: Tally,
    server: Server,
    lives: Iterator[float],
    seen: Counter[str],
    expected: list[dict[str, Any]],
) -> None:
    """One chain of kills; the jobs' outcomes must be those expected. `seen` counts what was killed."""
    server.start()
    known = Acknowledged()
    ids = two_jobs(server)
    known.jobs = dict.fromkeys(ids, False)
    tally.case(f"a second server beside {server.data_dir.name}", _beside(server))
    for for_s in lives:
        stand, lost = _life(server, ids, known, for_s)
        seen[stand] += 1
        fault = f"before it: {', '.join(lost)}" if lost else None
        tally.case(f"kill {sum(seen.values())}, {stand}", fault)
        if stand == "ended":
            break
        server.spawn()
    server.start()
    faults = known.lost(server, all_of_it=True)
    for each, whole in zip(ids, expected, strict=True):
        found = outcome_of(server, each)
        faults += [f"{each}: {name} differs" for name in whole if found[name] != whole[name]]
    if (code := server.stop()) != 0:
        faults.append(f"the last server ended with {code}")
    tally.case(f"the end of {server.data_dir.name}", ", ".join(faults) or None)


def _life(
    server: Server, ids: list[str], known: Acknowledged, for_s: float
) -> tuple[str, list[str]]:
    """A server so long from its start, or until the jobs have ended, and killed: where it stood then,
    and what it had lost.
    """
    end = running_s() + for_s
    if not until(server.serves, for_s, every_s=0.002):
        server.kill()
        return "starting", []
    lost = known.lost(server)
    with known.client(server):  # whose question is cut off, too
        stand = _stand(server, ids)
        while stand != "ended" and running_s() < end:
            time.sleep(0.01)
            stand = _stand(server, ids)
        server.kill()
    return stand, lost


def _stand(server: Server, ids: list[str]) -> str:
    """What the two jobs are at."""
    found = {job_of(server, each)["status"] for each in ids}
    if found <= set(ENDED):
        return "ended"
    if found & set(ENDED):
        return "one ended"
    return "training" if "running" in found else "looked over"


def _beside(server: Server) -> str | None:
    """A second server on the folder of a living one is refused."""
    child = Child(["serve", "--config", str(server.config)], server.data_dir.with_suffix(".second"))
    code = child.wait()
    if code != 2 or "another server is writing here" not in child.said:
        return f"ended with {code}: {child.said[-300:]}"
    return None
