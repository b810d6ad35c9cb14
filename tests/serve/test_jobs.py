"""Jobs: from rows to a model that answers; paused, resumed, cancelled and failed as the API says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from pennyweight.finetune import finetune
from pennyweight.serve.jobs import CreateJob
from pennyweight.serve.jobs.settle import kept
from pennyweight.serve.records import JobRecord
from pennyweight.serve.refusals import Refused

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def rows(count: int = 8, salt: str = "") -> bytes:
    turns = [
        [
            {"role": "user", "content": f"say {WORDS[i % 8]} {i}{salt}"},
            {"role": "assistant", "content": f"{WORDS[(i + 3) % 8]} {i}"},
        ]
        for i in range(count)
    ]
    return b"".join(json.dumps({"messages": each}).encode() + b"\n" for each in turns)


def upload(client: Any, content: bytes, name: str = "rows.jsonl") -> str:
    found = client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"})
    return str(found.json()["id"])


def create(client: Any, *, status: int = 200, headers: Any = None, **asked: Any) -> dict[str, Any]:
    body = {"model": "tiny", "seed": 3, "lora": LORA, "train": {"max_steps": 4}, **asked}
    if "training_file" not in body:
        body["training_file"] = upload(client, rows())
    found = client.post("/v1/fine_tuning/jobs", json=body, headers=headers)
    assert found.status_code == status, found.text
    answer: dict[str, Any] = found.json()
    return answer


def job_of(client: Any, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    return found


def until(client: Any, job: dict[str, Any], *wanted: str, timeout_s: float = 60) -> dict[str, Any]:
    end = time.monotonic() + timeout_s
    while (now := job_of(client, job))["status"] not in wanted:
        ended = now["status"] in ("succeeded", "failed", "cancelled")
        assert not ended, (now["status"], now["error"])
        assert time.monotonic() < end, now["status"]
        time.sleep(0.02)
    return now


def wait(happened: Callable[[], Any], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def events_of(client: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """All of them, oldest first, page by page as a client reads them."""
    path, found, more = f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100", [], True
    while more:
        after = f"&after={found[-1]['id']}" if found else ""
        page = client.get(path + after).json()
        found += page["data"]
        more = page["has_more"]
    return found[::-1]


def steps_of(client: Any, job: dict[str, Any]) -> list[int]:
    return [e["data"]["step"] for e in events_of(client, job) if "train_loss" in e["data"]]


def test_a_job_trains_is_told_billed_and_served(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(prices={"trained_per_million": 1e6, "evaluated_per_million": 1e6})
    alice, bob = client_of(service, "alice"), client_of(service, "bob")
    job = create(
        alice,
        validation_file=upload(alice, rows(3, " held out"), "held.jsonl"),
        suffix="mine",
        metadata={"team": "a"},
        train={"max_steps": 4, "eval_steps": 2},
    )
    assert job["status"] == "validating_files"
    assert job["hyperparameters"]["n_epochs"] == "auto"
    done = until(alice, job, "succeeded")
    name = done["fine_tuned_model"]
    assert name.startswith("ft:tiny:alice:mine:")
    assert done["hyperparameters"] == {
        "n_epochs": 3,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
    }
    assert done["finished_at"] >= done["created_at"]
    # What it says: newest first, each step once, metrics beside the words.
    told = events_of(alice, job)
    assert steps_of(alice, job) == [1, 2, 3, 4]
    assert told[-1]["message"].startswith(f"New fine-tuned model created: {name}")
    newest = alice.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=1").json()
    assert (newest["data"], newest["has_more"]) == ([told[-1]], True)
    # Its checkpoints are models of their own.
    kept_at = alice.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints").json()["data"]
    assert [each["step_number"] for each in kept_at] == [4, 2]
    assert kept_at[0]["fine_tuned_model_checkpoint"] == f"{name}:ckpt-step-4"
    assert {"train_loss", "valid_loss"} <= set(kept_at[0]["metrics"])
    asked = {
        "messages": [{"role": "user", "content": "say red"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    for model in (name, *(each["fine_tuned_model_checkpoint"] for each in kept_at)):
        found = alice.post("/v1/chat/completions", json={"model": model, **asked})
        assert found.status_code == 200
        assert bob.post("/v1/chat/completions", json={"model": model, **asked}).status_code == 404
    # What it used is billed to the token: steps, and evaluations of the held-out rows.
    metrics = [event["data"] for event in told if event["type"] == "metrics"]
    trained = sum(m["tokens"] for m in metrics if "train_loss" in m)
    evaluated = sum(m["tokens"] for m in metrics if "valid_loss" in m)
    total = alice.get(f"/v1/usage?job={job['id']}").json()["total"]
    assert (total["tokens_trained"], total["tokens_evaluated"]) == (trained, evaluated)
    assert evaluated > 0
    assert done["trained_tokens"] == trained + evaluated == total["cost"]
    assert total["device_seconds"] > 0
    table = alice.get(f"/v1/files/{done['result_files'][0]}/content").text
    assert table.splitlines()[0] == "step,train_loss,valid_loss"
    assert len(table.splitlines()) == 5
    # Nobody else sees it, and a list finds it by its metadata.
    assert bob.get(f"/v1/fine_tuning/jobs/{job['id']}").status_code == 404
    assert bob.get(f"/v1/fine_tuning/jobs/{job['id']}/events").status_code == 404
    assert bob.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").status_code == 404
    for query, count in (("metadata[team]=a", 1), ("metadata[team]=b", 0), ("limit=1", 1)):
        assert len(alice.get(f"/v1/fine_tuning/jobs?{query}").json()["data"]) == count
    assert alice.delete(f"/v1/models/{name}").json()["deleted"] is True
    assert alice.get(f"/v1/models/{name}").status_code == 404
    assert alice.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").status_code == 400


def test_paused_resumed_and_interrupted_by_the_servers_end_it_ends_with_the_same_bits(
    started: Callable[..., Any], client_of: Callable[..., Any], tmp_path: Path
) -> None:
    service = started()
    client = client_of(service)
    job = create(client, train={"max_steps": 9, "save_steps": 3})
    until(client, job, "running")
    wait(lambda: steps_of(client, job))
    assert client.post(f"/v1/fine_tuning/jobs/{job['id']}/pause").json()["status"] == "paused"
    wait(lambda: not service.foreman._lanes)
    made = steps_of(client, job)
    time.sleep(0.1)
    assert steps_of(client, job) == made
    assert client.post(f"/v1/fine_tuning/jobs/{job['id']}/resume").status_code == 200
    wait(lambda: len(steps_of(client, job)) > len(made))
    assert service.end(30)
    again = started()
    client = client_of(again)
    done = until(client, job, "succeeded")
    assert steps_of(client, job) == list(range(1, 10))
    run = kept(again.settings.data_path / "jobs" / job["id"])
    alone = run.model_copy(update={"output_dir": str(tmp_path / "alone")})
    finetune(alone)
    weights = "adapter/adapter_model.safetensors"
    expected = (tmp_path / "alone" / weights).read_bytes()
    assert (Path(run.output_dir) / weights).read_bytes() == expected
    tokens = sum(e["data"]["tokens"] for e in events_of(client, job) if "train_loss" in e["data"])
    assert done["trained_tokens"] == tokens


def test_a_pause_that_is_taken_back_before_it_was_seen_is_a_pause_all_the_same(
    started: Callable[..., Any], client_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = started()
    client = client_of(service)
    job = create(client, train={"max_steps": 5000, "save_steps": 5000})
    until(client, job, "running")
    with monkeypatch.context() as unseen:
        unseen.setattr(service.jobs, "_nudge", lambda: None)
        for verb in ("pause", "resume"):
            assert client.post(f"/v1/fine_tuning/jobs/{job['id']}/{verb}").status_code == 200
    service.foreman.nudge()
    until(client, job, "running")
    assert client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").status_code == 200


def test_a_cancelled_job_pays_for_its_steps_and_takes_no_more(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started()
    client = client_of(service)
    job = create(client, train={"max_steps": 5000, "save_steps": 5000})
    until(client, job, "running")
    wait(lambda: len(steps_of(client, job)) >= 3)
    assert client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
    wait(lambda: not service.foreman._lanes)
    made = steps_of(client, job)
    total = client.get(f"/v1/usage?job={job['id']}").json()["total"]
    told = [e["data"]["tokens"] for e in events_of(client, job) if "train_loss" in e["data"]]
    assert total["tokens_trained"] == sum(told) > 0
    time.sleep(0.1)
    assert steps_of(client, job) == made
    assert job_of(client, job)["status"] == "cancelled"
    assert client.post(f"/v1/fine_tuning/jobs/{job['id']}/resume").status_code == 400


def test_bad_rows_are_a_failed_job_that_names_file_and_line(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started())
    content = rows(2) + b'{"messages": [{"role": "assitant", "content": "x"}]}\n'
    job = create(client, training_file=upload(client, content, "my rows.jsonl"))
    failed = until(client, job, "failed")
    assert failed["error"]["code"] == "invalid_training_file"
    assert "my_rows.jsonl:3" in failed["error"]["message"]
    assert 'did you mean "assistant"' in failed["error"]["message"]
    assert events_of(client, job)[-1]["level"] == "error"
    empty = create(client, training_file=upload(client, b""))
    assert until(client, empty, "failed")["error"]["param"] == "training_file"


def test_what_no_job_may_ask_is_400_and_names_the_field(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started())
    file = upload(client, rows())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": "gpt-9"}, "model"),
        ({"training_file": "file-000000000000000000000000"}, "training_file"),
        ({"training_file": "../x"}, "training_file"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epoch": 1}}, "hyperparameters.n_epoch"),
        ({"suffix": "../x"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"lora": {"rank": 4}}, "lora.rank"),
        ({"lora": {"r": 4000}}, "lora.r"),
        ({"lora": {"target_modules": "(("}}, "lora.target_modules"),
        ({"train": {"report_to": ["wandb"]}}, "train.report_to"),
        ({"data": {"template": "/etc/passwd"}}, "data.template"),
        ({"data": {"train": "/etc/passwd"}}, "data.train"),
        ({"metadata": {"k": "v" * 600}}, "metadata.k"),
    ]
    for asked, param in cases:
        status = 404 if param == "training_file" else 400
        refused = create(client, status=status, **{"training_file": file, **asked})
        assert refused["error"]["param"] == param
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_one_idempotency_key_is_one_job(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started()
    client = client_of(service)
    file = upload(client, rows())
    head = {"idempotency-key": "once"}
    jobs = {create(client, training_file=file, headers=head)["id"] for _ in range(3)}
    assert len(jobs) == 1
    refused = create(client, training_file=file, headers=head, seed=4, status=400)
    assert refused["error"]["code"] == "idempotency_key_reused"
    assert service.store.count(JobRecord, {}) == 1


def test_one_request_fifty_times_at_once_is_one_job(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started()
    file = upload(client_of(service), rows())
    asked = CreateJob(model="tiny", training_file=file, lora=LORA, train={"max_steps": 1})
    with ThreadPoolExecutor(50) as pool:
        made = list(pool.map(lambda _: service.jobs.create("alice", asked, "once"), range(50)))
    assert len({job.id for job in made}) == service.store.count(JobRecord, {}) == 1
    # Another key's same name for a request is another request.
    with pytest.raises(Refused, match="no file"):
        service.jobs.create("bob", asked, "once")


def test_a_file_in_use_stays_until_its_job_has_ended(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started(jobs={"live_per_key": 1})
    client = client_of(service)
    file = upload(client, rows())
    job = create(client, training_file=file, train={"max_steps": 60})
    assert client.delete(f"/v1/files/{file}").json()["deleted"] is True
    folder = service.settings.data_path / "files" / file
    assert folder.is_dir()
    refused = create(client, status=429)
    assert refused["error"]["type"] == "rate_limit_error"
    until(client, job, "succeeded")
    wait(lambda: not folder.exists())
