"""One account for adapters, answers and jobs: what does not fit waits, what never fits is refused, and
all of it comes back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

from pennyweight.errors import ConfigError
from pennyweight.model import BaseModel
from pennyweight.serve.memory import TRAINING, Memory, Need, left_beside
from pennyweight.serve.settings import ServeSettings
from tests.serve.test_answers import TURN, ask, make_adapter
from tests.serve.test_jobs import create, events_of, job_of, steps_of, until, wait

LARGE = {"r": 256, "lora_alpha": 4, "target_modules": "all-linear"}
STANDING = 16 * 262_144
# Room for one such job, and not for two.
ONE_JOB = {"limit": "10MB", "answers": 0.4}


def held(service: Any) -> dict[str, int]:
    found: dict[str, int] = service.memory.budget.held()
    return found


def test_jobs_that_fit_only_one_after_another_do_so_and_chat_goes_on(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(memory=ONE_JOB)
    client = client_of(service)
    first = create(client, lora=LARGE, train={"max_steps": 5000, "save_steps": 5000})
    until(client, first, "running")
    second = create(client, lora=LARGE)
    third = create(client)  # it would fit, and does not go before the second

    def told() -> list[str]:
        return [e["message"] for e in events_of(client, second) if "waits" in e["message"]]

    wait(told)
    assert told() == [told()[0]]
    assert told()[0].startswith("The job waits for memory: it needs up to 4.")
    assert held(service)[TRAINING] == STANDING
    assert service.memory.budget.waiting == TRAINING
    done = len(steps_of(client, first))
    assert ask(client)["choices"]
    wait(lambda: len(steps_of(client, first)) > done)
    assert [job_of(client, job)["status"] for job in (second, third)] == ["queued", "queued"]
    client.post(f"/v1/fine_tuning/jobs/{first['id']}/cancel")
    for job in (second, third):
        until(client, job, "succeeded")
    wait(lambda: TRAINING not in held(service))
    assert service.memory.budget.waiting is None


def test_nobody_waits_for_a_job_that_is_gone(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(memory=ONE_JOB)
    client = client_of(service)
    first = create(client, lora=LARGE, train={"max_steps": 5000, "save_steps": 5000})
    until(client, first, "running")
    second = create(client, lora=LARGE)
    wait(lambda: service.memory.budget.waiting == TRAINING)
    client.post(f"/v1/fine_tuning/jobs/{second['id']}/cancel")
    wait(lambda: service.memory.budget.waiting is None)
    client.post(f"/v1/fine_tuning/jobs/{first['id']}/pause")
    wait(lambda: TRAINING not in held(service))  # a paused job holds nothing
    client.post(f"/v1/fine_tuning/jobs/{first['id']}/resume")
    wait(lambda: held(service).get(TRAINING) == STANDING)


def test_a_job_that_never_fits_fails_with_figures_and_the_mend(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(memory={"limit": "5MB"})
    client = client_of(service)
    failed = until(client, create(client, lora=LARGE), "failed")
    assert failed["error"]["code"] == "out_of_memory"
    said = failed["error"]["message"]
    assert said.startswith("the job needs 4.3 MB beside the base, 4.2 MB of it for adapter and opt")
    assert "jobs can have 3.8 MB here: with" in said
    assert re.search(r" with lora\.r=128 it would need 2\.\d MB$", said)
    from pennyweight.serve.jobs import CreateJob
    from pennyweight.serve.web.looking import look

    asked = {"model": "tiny", "training_file": failed["training_file"], "lora": LARGE}
    seen = look(service, "alice", CreateJob(**asked))
    assert seen.shown
    assert (seen.ready, seen.plan and seen.plan["said"]) == (False, f"It does not fit: {said}.")


def test_a_lane_that_breaks_gives_its_memory_back(started: Callable[..., Any]) -> None:
    service = started()

    class Breaks:
        weight, busy, name = 1.0, True, "breaks"

        def work(self) -> float:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert service.engine.admit("breaks", Need(1000, 0))
    assert held(service)[TRAINING] == 1000
    service.engine.train(Breaks())
    wait(lambda: TRAINING not in held(service))
    assert service.engine.alive


def test_the_largest_pass_is_counted_once(small_base: BaseModel) -> None:
    settings = ServeSettings.model_validate(
        {"base": {"model": str(small_base.folder)}, "memory": {"limit": "64MB"}}
    )
    memory = Memory(small_base, settings)
    own = memory.budget.held()["passes"]
    asked: list[tuple[int, str]] = []

    def admit(name: str, need: Need) -> bool:
        return memory.admit(name, need, lambda *wanted: asked.append(wanted))

    assert admit("a", Need(1000, own + 500))
    assert admit("b", Need(2000, own + 300))
    assert memory.budget.held()[TRAINING] == 3500
    memory.leave("a")
    assert memory.budget.held()[TRAINING] == 2300
    assert not admit("c", Need(64_000_000, 0))
    assert memory.budget.waiting == TRAINING
    memory.leave("c")
    assert admit("d", Need(10, 0))
    assert memory.budget.waiting is None
    memory.leave("b"), memory.leave("d")
    assert memory.budget.held() == {"passes": own}
    assert asked == [(n, TRAINING) for n in (1500, 2000, 64_000_000, 10)]


def test_a_server_without_room_for_one_step_does_not_begin(small_base: BaseModel) -> None:
    tree = {"base": {"model": str(small_base.folder)}, "memory": {"limit": "1.1MB", "answers": 0.6}}
    with pytest.raises(ConfigError, match=r"memory.limit: 1.1 MB beside the base.*lower chat.rows"):
        Memory(small_base, ServeSettings.model_validate(tree))
    with pytest.raises(ValueError, match="write it like 24GB"):
        ServeSettings.model_validate({"memory": {"limit": "much"}})
    assert left_beside(small_base) >= 2**28


def test_adapters_and_answers_take_turns_where_memory_is_short_and_say_the_same(
    started: Callable[..., Any],
    client_of: Callable[..., Any],
    small_base: BaseModel,
    tmp_path: Path,
) -> None:
    names = ("one", "two", "three", "tiny")
    for seed, name in enumerate(names[:3], 1):
        make_adapter(small_base, tmp_path / "adapters" / name, seed)
    # For certain: two of the three adapters, and one row of 128 tokens.
    service = started(
        adapters=str(tmp_path / "adapters"), memory={"limit": "1.1MB", "answers": 0.05}
    )
    client = client_of(service)

    def answers() -> dict[str, str]:
        found = {name: ask(client, name)["choices"][0]["message"]["content"] for name in names}
        assert len(set(found.values())) == len(names)
        return found

    expected = answers()
    everything = lambda _: service.memory.budget.free_for(TRAINING)  # noqa: E731
    service.engine.call(lambda _: service.engine._beside.clear())
    rest = service.engine.call(everything)
    assert service.memory.budget.reserve(TRAINING, rest)
    assert answers() == expected
    assert len(service.engine._beside._bank.versions()) == 2

    async def at_once() -> list[str]:
        from pennyweight.serve.questions import How

        async def answer(name: str) -> str:
            model = service.catalogue.get("alice", name)
            how = How(max_new_tokens=8, temperature=0)
            found = service.questions.ask(service.questions.chat("a", model, TURN, None, how))
            text = "".join([part.text async for part in found.parts()])
            await found.close()
            return text

        return await asyncio.gather(*(answer(name) for name in names * 3))

    assert asyncio.run(at_once()) == [expected[name] for name in names * 3]
    wait(lambda: held(service).get("keys and values", 0) == 0)
    # Beyond their floor adapters stand until a job waits for that memory; answers go on.
    service.memory.budget.release(TRAINING, rest)
    assert answers() == expected
    assert len(service.engine._beside._bank.versions()) == 3
    assert not service.engine.admit("job", Need(service.memory.jobs_bytes, 0))
    assert answers() == expected
    assert len(service.engine._beside._bank.versions()) == 2


def test_a_prompt_that_the_memory_kept_for_answers_never_holds_is_400(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started(memory={"limit": "1.1MB", "answers": 0.05}))
    body = {"model": "tiny", "prompt": list(range(5, 60)) * 3, "max_tokens": 2}
    refused = client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert "165 tokens, and the memory kept for answers holds 128" in refused.text
    cut = client.post("/v1/completions", json={**body, "prompt": list(range(5, 105))})
    assert cut.status_code == 200


def test_an_adapter_that_could_wait_for_ever_is_refused(
    started: Callable[..., Any],
    client_of: Callable[..., Any],
    small_base: BaseModel,
    tmp_path: Path,
) -> None:
    make_adapter(small_base, tmp_path / "adapters" / "one", 1)
    service = started(
        load_from=[str(tmp_path / "adapters")], memory={"limit": "1.1MB", "answers": 0.01}
    )
    asked = {"lora_name": "one", "lora_path": "one"}
    refused = client_of(service).post("/v1/load_lora_adapter", json=asked)
    assert refused.status_code == 400
    assert "are kept for adapters here: lower its rank" in refused.json()["error"]["message"]


def test_memory_that_did_not_do_after_all_ends_answers_and_comes_back(
    started: Callable[..., Any], client_of: Callable[..., Any], small_base: BaseModel
) -> None:
    service = started()
    client = client_of(service)
    expected = ask(client)["choices"]
    left = [1]

    def short_once(*_: Any) -> None:
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = small_base.module.get_input_embeddings().register_forward_pre_hook(short_once)
    try:
        body = {"model": "tiny", "messages": TURN, "max_tokens": 8}
        refused = client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
        assert int(refused.headers["retry-after"]) >= 1
        assert "keys and values" not in held(service)
        assert ask(client)["choices"] == expected
    finally:
        hook.remove()


def test_an_admin_sees_how_memory_stands(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(memory={"limit": "10MB"})
    told = client_of(service, "alice").get("/v1/usage").json()["memory"]
    assert told["total_bytes"] == 10_000_000
    assert told["free_bytes"] + sum(told["held_bytes"].values()) == 10_000_000
    assert client_of(service, "bob").get("/v1/usage").json()["memory"] is None
