"""Chat and completions: what is asked is what was trained, and the answer is the model's own."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import torch

from pennyweight.config import LoraConfig
from pennyweight.data.chat import Renderer
from pennyweight.generate import Request, generate
from pennyweight.lora import adapter_of, attach, described, detach
from pennyweight.model import BaseModel
from pennyweight.registry import Registry
from pennyweight.runs.asking import Asking
from tests.serve.conftest import KEYS

TURN = [{"role": "user", "content": "the question"}]


def make_adapter(base: BaseModel, folder: Path, seed: int) -> Path:
    """An adapter that changes every answer, as a folder in PEFT's layout."""
    config = LoraConfig(r=4, target_modules=("q_proj", "v_proj", "down_proj"))
    attach(base, config, name="made", seed=seed)
    adapter = adapter_of(base, "made", config)
    generator = torch.Generator().manual_seed(seed)
    for a, b in adapter.factors.values():
        a.data.normal_(generator=generator)
        b.data.normal_(generator=generator)
    described(adapter, base).save(folder)
    detach(base, "made")
    return folder


@pytest.fixture
def adapters(small_base: BaseModel, tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two"), 1):
        make_adapter(small_base, tmp_path / "adapters" / name, seed)
    return tmp_path / "adapters"


def events(text: str) -> Iterator[dict[str, Any]]:
    *lines, done = [line for line in text.split("\n\n") if line]
    assert done == "data: [DONE]"
    yield from (json.loads(line.removeprefix("data: ")) for line in lines)


def ask(client: Any, model: str = "tiny", **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": TURN, "max_tokens": 8, "temperature": 0, **more}
    found = client.post("/v1/chat/completions", json=body)
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


def test_the_prompt_is_what_training_renders_and_the_answer_is_the_models(
    started: Callable[..., Any], client_of: Callable[..., Any], small_base: BaseModel
) -> None:
    answer = ask(client_of(started()))
    request = Asking.of(small_base, Renderer(small_base.tokenizer)).request(
        TURN, like=Request((), max_new_tokens=8)
    )
    (expected,) = generate(small_base, [request])
    assert answer["choices"][0]["message"]["content"] == small_base.tokenizer.decode(
        expected.ids, skip_special_tokens=True
    )
    assert answer["usage"]["prompt_tokens"] == len(request.prompt_ids)
    assert answer["choices"][0]["finish_reason"] == expected.stop_reason


def test_a_stream_says_the_same_piece_by_piece(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started())
    whole = ask(client, n=2, seed=5, temperature=1, logprobs=True, top_logprobs=2)
    body = {
        "model": "tiny",
        "messages": TURN,
        "max_tokens": 8,
        "n": 2,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    found = client.post("/v1/chat/completions", json=body)
    assert found.headers["content-type"].startswith("text/event-stream")
    chunks = list(events(found.text))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for at, choice in enumerate(whole["choices"]):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == at]
        assert parts[0]["delta"]["role"] == "assistant"
        said = "".join(part["delta"].get("content", "") for part in parts)
        assert said == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        told = [t for part in parts if part["logprobs"] for t in part["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]
        assert all(len(token["top_logprobs"]) == 2 for token in told)
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]


def test_a_stop_text_ends_the_answer_before_it(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started())
    text = ask(client, seed=1, temperature=1, max_tokens=20)["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    choice = ask(client, seed=1, temperature=1, max_tokens=20, stop=[stop, "never"])["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_each_adapter_of_the_folder_answers_by_its_name(
    started: Callable[..., Any], client_of: Callable[..., Any], adapters: Path
) -> None:
    service = started(adapters=str(adapters))
    client = client_of(service, "bob")
    named = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert list(named) == ["tiny", "one", "two"]
    assert named["one"]["parent"] == "tiny"
    said = {name: ask(client, name)["choices"][0]["message"]["content"] for name in named}
    assert len(set(said.values())) == 3
    assert client.delete("/v1/models/one").status_code == 403


def test_a_registry_is_served_by_its_names_and_tags(
    started: Callable[..., Any], adapters: Path, tmp_path: Path
) -> None:
    kept = Registry(tmp_path / "registry")
    kept.add(adapters / "one", name="mine", tags=["prod"])
    kept.add(adapters / "two", name="mine")
    found = started(adapters=str(tmp_path / "registry")).catalogue.listed("bob")
    assert sorted(model.id for model in found) == ["mine", "mine@prod", "tiny"]
    assert len({model.version for model in found}) == 3


def test_adapters_are_loaded_from_allowed_folders_alone(
    started: Callable[..., Any],
    client_of: Callable[..., Any],
    adapters: Path,
    tmp_path: Path,
) -> None:
    service = started(load_from=[str(adapters)])
    alice, bob = client_of(service, "alice"), client_of(service, "bob")

    def load(client: Any, name: str, path: str) -> int:
        body = {"lora_name": name, "lora_path": path}
        return int(client.post("/v1/load_lora_adapter", json=body).status_code)

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(adapters / "one", elsewhere)
    (adapters / "link").symlink_to(elsewhere)
    for path in (
        str(elsewhere),
        "../elsewhere",
        "one/../../elsewhere",
        "link",
        "/etc",
        "",
        "\0",
        ".",
    ):
        assert load(alice, "mine", path) in (400, 403), path
    for name in ("../x", "Mine", "", "a" * 65, "tiny"):
        assert load(alice, name, "one") == 400
    assert load(alice, "mine", "one") == 200
    assert load(alice, "mine", "two") == 400
    # Another key's adapter is not there for anybody else, and its name is free for them.
    assert bob.get("/v1/models/mine").status_code == 404
    missing = bob.post("/v1/chat/completions", json={"model": "mine", "messages": TURN})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert load(bob, "mine", str(adapters / "two")) == 200
    said = [ask(client, "mine")["choices"][0]["message"]["content"] for client in (alice, bob)]
    assert said[0] != said[1]
    assert bob.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    assert bob.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 404
    assert alice.get("/v1/models/mine").status_code == 200


def test_a_damaged_adapter_is_passed_over_and_said(
    started: Callable[..., Any], adapters: Path
) -> None:
    (adapters / "two" / "adapter_model.safetensors").write_bytes(b"nonsense")
    service = started(adapters=str(adapters))
    assert [note.split(":")[0] for note in service.notes] == ["two"]
    assert [model.id for model in service.catalogue.listed("bob")] == ["tiny", "one"]


def test_what_cannot_be_answered_as_asked_is_400_and_names_the_field(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages"),
        ({"messages": TURN, "temperature": 3}, "temperature"),
        ({"messages": TURN, "top_p": 0}, "top_p"),
        ({"messages": TURN, "max_tokens": 0}, "max_tokens"),
        ({"messages": TURN, "top_q": 1}, "top_q"),
        ({"messages": TURN, "frequency_penalty": 1}, "frequency_penalty"),
        ({"messages": TURN, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": TURN, "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": TURN, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": TURN, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a<|im_end|>b"}]}, "messages[0].content"),
        ({"messages": TURN, "tools": [{"name": "</s>"}]}, "tools[0].name"),
    ]
    for body, param in cases:
        found = client.post("/v1/chat/completions", json={"model": "tiny", **body})
        assert (found.status_code, found.json()["error"]["param"]) == (400, param)


def test_what_clients_send_without_meaning_anything_by_it_changes_nothing(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started())
    nothing = dict.fromkeys(("audio", "functions", "web_search_options", "prediction", "stop"))
    sent = ask(client, modalities=["text"], frequency_penalty=0, logit_bias={}, **nothing)
    assert sent["choices"] == ask(client)["choices"]


def test_a_completion_continues_text_as_it_stands(
    started: Callable[..., Any], client_of: Callable[..., Any], small_base: BaseModel
) -> None:
    client = client_of(started())
    body = {"model": "tiny", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    found = client.post("/v1/completions", json={**body, "prompt": ["the", "an"]}).json()
    ids = [tuple(small_base.tokenizer(text)["input_ids"]) for text in ("the", "an")]
    for choice, prompt in zip(found["choices"], ids, strict=True):
        (expected,) = generate(small_base, [Request(prompt, max_new_tokens=4)])
        assert choice["text"] == small_base.tokenizer.decode(expected.ids, skip_special_tokens=True)
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
    by_ids = client.post("/v1/completions", json={**body, "prompt": [list(i) for i in ids]}).json()
    assert [c["text"] for c in by_ids["choices"]] == [c["text"] for c in found["choices"]]
    strange = client.post("/v1/completions", json={**body, "prompt": [10**9]})
    assert strange.status_code == 400


def test_what_is_too_much_is_429_and_nothing_is_lost(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(chat={"rows": 1, "waiting": 1})
    client = client_of(service)
    gate = threading.Event()
    service.engine._order(gate.wait)  # nothing is answered until it opens
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, n=2)
        try:
            while service.engine.asked < 2:
                time.sleep(0.01)
            body = {"model": "tiny", "messages": TURN, "max_tokens": 2}
            refused = client.post("/v1/chat/completions", json=body)
        finally:
            gate.set()
        assert len(first.result()["choices"]) == 2
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert service.engine.asked == 0


def test_what_may_never_wait_is_400_so_that_nobody_comes_again_for_it(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(chat={"rows": 1, "waiting": 1})
    body = {"model": "tiny", "prompt": ["the", "an"], "n": 2, "max_tokens": 2}
    refused = client_of(service).post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_many_choices")
    assert service.engine.asked == 0


def test_under_load_the_queue_is_bounded_and_who_comes_again_is_answered(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(chat={"rows": 2, "waiting": 2})
    client = client_of(service)
    body = {"model": "tiny", "messages": TURN, "max_tokens": 4, "temperature": 0}
    refusals, most = 0, 0

    def answered(_: int) -> str:
        nonlocal refusals, most
        while True:
            found = client.post("/v1/chat/completions", json=body)
            most = max(most, service.engine.asked)
            if found.status_code == 200:
                return str(found.json()["choices"][0]["message"]["content"])
            assert found.status_code == 429
            refusals += 1
            time.sleep(int(found.headers["retry-after"]) / 50)

    with ThreadPoolExecutor(12) as pool:
        said = set(pool.map(answered, range(24)))
    assert len(said) == 1
    assert refusals > 0
    assert most <= 4
    assert service.engine.asked == 0
    assert client.get("/v1/usage").json()["total"]["requests"] == 24


def test_a_client_that_leaves_frees_its_row(started: Callable[..., Any]) -> None:
    service = started()

    async def leave() -> None:
        from pennyweight.serve.questions import How

        question = service.questions.chat(
            "bob", service.catalogue.base, TURN, None, How(max_new_tokens=200, temperature=0)
        )
        answer = service.questions.ask(question)
        async for _ in answer.parts():
            break
        waiting = answer.abandon()
        await asyncio.wrap_future(waiting)

    asyncio.run(leave())
    assert service.engine.asked == 0
    assert service.engine.call(lambda base: service.engine._answering.busy) is False
    (row,) = service.store.usage({"owner": "bob"}, since=0, until=2**40)
    assert row.tokens_out >= 1  # what was made is billed


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_ends_before_its_answer_frees_its_row(
    started: Callable[..., Any], stream: bool
) -> None:
    from pennyweight.serve.api import create_app

    service = started()
    app = create_app(service)
    body = {"model": "tiny", "messages": TURN, "max_tokens": 150, "temperature": 0}
    told = [
        {"type": "http.request", "body": json.dumps({**body, "stream": stream}).encode()},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return told.pop(0) if len(told) > 1 else told[0]

    async def send(_: Any) -> None:
        pass

    head = [(b"authorization", f"Bearer {KEYS['bob']}".encode())]
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "headers": head, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert service.engine.asked == 0
    assert service.engine.call(lambda base: service.engine._answering.busy) is False
    service.cashier.submit(lambda: None).result()
    (row,) = service.store.usage({"owner": "bob"}, since=0, until=2**40)
    assert row.tokens_out < 150


def test_an_answer_does_not_wait_for_what_jobs_write_down(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started()
    gate = threading.Event()
    service.clerk.submit(gate.wait)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client_of(service))
        try:
            said = asked.result(timeout=30)
        finally:
            gate.set()
    assert said["usage"]["completion_tokens"] > 0


def test_a_large_body_is_read_as_a_small_one(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started())
    assert ask(client, user="x" * 200_000)["choices"] == ask(client)["choices"]
    body = {"model": "tiny", "messages": TURN, "usr": "x" * 200_000}
    refused = client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "usr")


def test_usage_is_told_by_key_model_and_hour_with_its_cost(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(
        prices={"input_per_million": 1e6, "output_per_million": 2e6, "currency": "EUR"}
    )
    alice, bob = client_of(service, "alice"), client_of(service, "bob")
    for client in (alice, alice, bob):
        used = ask(client)["usage"]
    mine = bob.get("/v1/usage").json()
    assert mine["currency"] == "EUR"
    assert mine["total"]["tokens_in"] == used["prompt_tokens"]
    assert mine["total"]["tokens_out"] == used["completion_tokens"]
    assert mine["total"]["cost"] == used["prompt_tokens"] + 2 * used["completion_tokens"]
    assert mine["total"]["device_seconds"] > 0
    assert bob.get("/v1/usage?key=alice").status_code == 403
    assert bob.get("/v1/usage?group_by=colour").status_code == 400
    everyone = alice.get("/v1/usage?group_by=key,model,hour").json()["data"]
    assert {(row["key"], row["requests"]) for row in everyone} == {("alice", 2), ("bob", 1)}
    assert all(row["start_time"] % 3600 == 0 and row["model"] == "tiny" for row in everyone)
    assert alice.get("/v1/usage?end_time=3600").json()["total"]["requests"] == 0
