"""The story of OpenAI's own client, unmodified, against a true `pennyweight serve` on a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "fastapi", reason="the server's extra is not installed: pip install -e .[serve]"
)
openai = pytest.importorskip("openai", reason="the client is not installed: pip install openai")

from campaigns.server import Server

TOKEN, ASKED = "hf_" + "canaryCanary" * 3, "a canary in a question"
FEW = {"lora": {"r": 4}, "train": {"learning_rate": 5e-3}}


def rows(count: int, salt: str = "") -> bytes:
    words = ("red", "green", "blue", "one", "two", "three", "cat", "dog")
    turns = [
        [
            {"role": "user", "content": f"say {words[i % 8]} {i}{salt}"},
            {"role": "assistant", "content": f"{words[(i + 3) % 8]} {i}"},
        ]
        for i in range(count)
    ]
    return b"".join(json.dumps({"messages": each}).encode() + b"\n" for each in turns)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", TOKEN)
        with Server(folder / "data", jobs={"running": 1}) as running:
            yield running
            assert running.stop(30) == 0
    # Keys, tokens and what was asked are in nothing that was written: no log, event, card, receipt
    # or store.
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in (running.key, TOKEN, ASKED):
        assert secret not in running.said()
        assert not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0) as made:
        yield made


def until(client: Any, job_id: str, *wanted: str) -> Any:
    end = time.monotonic() + 120
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in wanted:
        assert job.status not in ("succeeded", "failed", "cancelled"), job.error
        assert time.monotonic() < end, job
        time.sleep(0.05)
    return job


def test_upload_create_follow_retrieve_chat_and_stream(client: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(rows(8))
    (tmp_path / "held.jsonl").write_bytes(rows(2, " held out"))
    with (tmp_path / "train.jsonl").open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune")
    with (tmp_path / "held.jsonl").open("rb") as content:
        held = client.files.create(file=content, purpose="fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).content == rows(8)
    job = client.fine_tuning.jobs.create(
        model="base",
        training_file=file.id,
        validation_file=held.id,
        suffix="story",
        seed=1,
        metadata={"told": "once"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}},
        },
        extra_body=FEW,
    )
    assert job.status == "validating_files"
    done = until(client, job.id, "succeeded")
    assert done.hyperparameters.n_epochs == 1
    assert done.trained_tokens > 0
    told = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    assert [e.data["step"] for e in told if e.type == "metrics" and "train_loss" in e.data] == [
        2,
        1,
    ]
    assert told[0].message.startswith("New fine-tuned model created")
    assert told[-1].message.startswith("Created fine-tuning job")
    points = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert {point.step_number for point in points} == {1, 2}
    assert all(point.metrics.valid_loss > 0 for point in points)
    names = {model.id for model in client.models.list()}
    assert {"base", done.fine_tuned_model} <= names
    assert client.models.retrieve(done.fine_tuned_model).parent == "base"
    for model in ("base", done.fine_tuned_model, points[-1].fine_tuned_model_checkpoint):
        asked: Any = {
            "model": model,
            "messages": [{"role": "user", "content": f"say red 1, {ASKED}"}],
            "max_completion_tokens": 6,
            "temperature": 0,
        }
        answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
        choice = answer.choices[0]
        assert choice.finish_reason in ("stop", "length")
        assert all(t.logprob == t.top_logprobs[0].logprob for t in choice.logprobs.content)
        stream = client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert said == choice.message.content
        assert chunks[-1].usage == answer.usage
    text = client.completions.create(model="base", prompt="def f(", max_tokens=4, temperature=0)
    assert text.usage.completion_tokens <= 4
    assert [j.id for j in client.fine_tuning.jobs.list(metadata={"told": "once"})] == [job.id]
    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(done.fine_tuned_model)
    assert client.files.delete(file.id).deleted
    assert file.id not in {each.id for each in client.files.list()}


def test_pause_resume_and_cancel(client: Any) -> None:
    jobs = client.fine_tuning.jobs
    file = client.files.create(file=("rows.jsonl", rows(8)), purpose="fine-tune")
    asked = {"lora": {"r": 4}, "train": {"max_steps": 500, "save_steps": 500}}
    job = jobs.create(model="base", training_file=file.id, extra_body=asked)
    until(client, job.id, "running")
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status in ("validating_files", "queued", "running")
    until(client, job.id, "running")
    assert jobs.cancel(job.id).status == "cancelled"
    assert jobs.retrieve(job.id).status == "cancelled"
    assert jobs.list(limit=1).data[0].id == job.id


def test_errors_are_typed(client: Any, server: Server) -> None:
    nobody = openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0)
    with nobody, pytest.raises(openai.AuthenticationError):
        nobody.models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", messages=[{"role": "user", "content": "x"}])
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id.startswith("req_")
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(
            model="base", training_file="file-000", method={"type": "dpo"}
        )
    assert refused.value.param == "method.type"
    file = client.files.create(file=("bad.jsonl", b'{"messages": 1}\n'), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="base", training_file=file.id)
    failed = until(client, job.id, "failed")
    assert "bad.jsonl:1" in failed.error.message
