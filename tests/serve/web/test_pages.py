"""The pages as a browser gets them: signed in by a cookie, escaped, held to a strict policy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from pennyweight.builtin import task
from pennyweight.plan import named_device
from pennyweight.serve.records import (
    CheckpointRecord,
    EventRecord,
    FileRecord,
    JobRecord,
    ModelRecord,
    Usage,
)
from tests.serve.conftest import KEYS

pytest.importorskip("fastapi")

from pennyweight.serve.keys import COOKIE
from pennyweight.serve.web import mount
from pennyweight.serve.web.looks import HEADERS, STATIC
from pennyweight.serve.web.views import figures_of

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
BROWSER = {"accept": "text/html", "origin": "http://testserver"}
PAGES = ["/", "/jobs/new", "/adapters", "/playground", "/usage", "/jobs/ftjob-1"]


@pytest.fixture
def service(started: Callable[..., Any]) -> Any:
    made = started()
    mount(made)
    return made


@pytest.fixture
def page(service: Any, client_of: Callable[..., Any]) -> Any:
    """A browser that is signed in as alice."""
    browser = client_of(service, None)
    browser.headers.update(BROWSER)
    answer = browser.post("/login", data={"key": KEYS["alice"]}, follow_redirects=False)
    assert answer.status_code == 303
    return browser


def job(service: Any, **values: Any) -> JobRecord:
    """A job with a file, two steps and both held-out losses, all named as badly as can be."""
    fields: dict[str, Any] = {
        "id": "ftjob-1",
        "owner": "alice",
        "created_at": 1_790_000_000,
        "status": "succeeded",
        "model": "tiny",
        "training_file": "file-1",
        "validation_file": None,
        "seed": 7,
        "suffix": NASTY,
        "priority": "normal",
        "asked": {},
        "hyperparameters": {"n_epochs": 3, "batch_size": 4},
        "metadata": {},
        "fine_tuned_model": f"ft:{NASTY}",
        "trained_tokens": 61_204,
    }
    made = JobRecord(**(fields | values))
    file = FileRecord("file-1", "alice", NASTY, "fine-tune", 10, "0" * 64, 1_790_000_000, "x")
    first = EventRecord("ev-0", made.id, "created", 1_790_000_000, "info", "message", NASTY, {})
    service.store.add(file)
    service.store.create_job(made, first)
    figures = [
        ("step 0", {"step": 0, "valid_loss": 3.062}),
        ("step 1", {"step": 1, "total_steps": 2, "train_loss": 2.5}),
        ("step 2", {"step": 2, "total_steps": 2, "train_loss": 1.25, "valid_loss": 0.0641}),
    ]
    events = [
        EventRecord(f"ev-{mark}", made.id, mark, 1_790_000_001, "info", "metrics", NASTY, data)
        for mark, data in figures
    ]
    service.store.record_progress(made.id, events, lambda event: None)
    return made


class Seen(HTMLParser):
    """What of a page a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] in ("script", "style") and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside.append("")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("path", PAGES)
def test_without_a_key_there_is_only_the_door(
    service: Any, client_of: Callable[..., Any], path: str
) -> None:
    stranger = client_of(service, None)
    answer = stranger.get(path, headers={"accept": "text/html"})
    assert answer.status_code == 401
    assert 'action="/login"' in answer.text
    assert answer.headers["content-security-policy"] == HEADERS["content-security-policy"]
    assert stranger.get(path).json()["error"]["code"] == "invalid_api_key"


def test_only_the_door_and_its_looks_are_open(service: Any, client_of: Callable[..., Any]) -> None:
    stranger = client_of(service, None)
    looks = {path for path in service.open_paths if path.startswith("/static/")}
    assert service.open_paths - looks == {"/healthz", "/login"}
    asked = 0
    for route in (route for router in service.pages for route in router.routes):
        path = re.sub(r"{[^}]*}", "x", route.path)
        if path == "/login":
            continue
        for method in route.methods:
            assert stranger.request(method, path).status_code == 401, (method, path)
            asked += 1
    assert asked > 15


def test_a_wrong_key_and_a_form_elsewhere_are_refused(
    service: Any, client_of: Callable[..., Any]
) -> None:
    browser = client_of(service, None)
    wrong = browser.post("/login", data={"key": "pw-nobody's"}, headers=BROWSER)
    assert wrong.status_code == 401
    assert "not a key of this server" in wrong.text
    assert not browser.cookies
    elsewhere = {"origin": "http://evil.example"}
    answer = browser.post("/login", data={"key": KEYS["alice"]}, headers=elsewhere)
    assert answer.status_code == 403
    assert not browser.cookies


def test_the_cookie_is_for_this_site_alone(service: Any, client_of: Callable[..., Any]) -> None:
    browser = client_of(service, None)
    form = {"key": f" {KEYS['alice']}\n", "next": "//evil.example"}
    answer = browser.post("/login", data=form, headers=BROWSER, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(COOKIE)
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip() for part in cookie.split(";")}
    assert KEYS["alice"] not in cookie
    onwards = {"key": KEYS["alice"], "next": "/usage?days=7"}
    answer = browser.post("/login", data=onwards, headers=BROWSER, follow_redirects=False)
    assert answer.headers["location"] == "/usage?days=7"
    browser.post("/logout", headers=BROWSER)
    assert browser.get("/", headers={"accept": "text/html"}).status_code == 401


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_whole_escaped_and_within_the_policy(
    service: Any, page: Any, path: str
) -> None:
    made = job(service)
    named = ModelRecord(f"ft:{NASTY}", "alice", 1, "v" * 64, "tiny", made.id)
    service.store.name_model(named)
    point = CheckpointRecord("ckpt-1", made.id, 1, 1, f"{NASTY}:ckpt", {})
    service.store.add_checkpoint(point, replace(named, id=point.model))
    service.store.bill([Usage(hour=1_790_000_000, owner="alice", model=NASTY, tokens_in=5)])
    answer = page.get(path if path != "/usage" else "/usage?days=3000")
    assert answer.status_code == 200, answer.text
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    seen = Seen(answer.text)
    # No script but ours by its address, no handler and no style in the page itself.
    assert {tag.get("src", "").split("?")[0] for tag in seen.all("script")} == {
        "/static/vendor/htmx.min.js",
        "/static/vendor/uPlot.iife.min.js",
        "/static/page.js",
    }
    assert not seen.inline
    assert not seen.all("img")
    for tag, attributes in seen.tags:
        assert tag != "style"
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert not re.match(r"\s*javascript:", attributes.get("href") or "")
    # Landmarks, one heading, a way past the menu, a label for each field.
    assert [len(seen.all(tag)) for tag in ("main", "header", "footer", "h1", "nav")] == [1] * 5
    assert seen.all("html")[0]["lang"] == "en"
    assert 'href="#main"' in answer.text
    labels = {tag.get("for") for tag in seen.all("label")}
    for field in (*seen.all("input"), *seen.all("textarea"), *seen.all("select")):
        wrapped = field.get("type") in ("hidden", "radio", "checkbox")
        assert wrapped or field.get("id") in labels, field


def test_another_keys_job_is_not_there(service: Any, page: Any) -> None:
    job(service, owner="bob")
    assert "Teach the model something" in page.get("/").text
    for path in ("/jobs/ftjob-1", "/jobs/ftjob-1/curve", "/jobs/ftjob-1/log", "/jobs/ftjob-2"):
        answer = page.get(path)
        assert answer.status_code == 404
        assert "Nothing here" in answer.text


def test_a_job_tells_its_figures(service: Any, page: Any) -> None:
    job(service)
    text = page.get("/jobs/ftjob-1").text
    for told in ("Ready", "3.062", "0.0641", "61,204", "of 2"):
        assert told in text
    curve = page.get("/jobs/ftjob-1/curve").json()
    assert curve["data"] == [[0, 1, 2], [None, 2.5, 1.25], [3.062, None, 0.0641]]
    assert curve["ended"] is True
    assert "0.0641 on held-out rows (the bare base 3.062)" in curve["says"]
    assert page.get("/jobs/ftjob-1/figures").text.count("<tr>") == 4
    assert "hx-trigger" not in page.get("/jobs/ftjob-1/status").text


def test_a_live_job_is_asked_again_and_can_be_stopped(service: Any, page: Any) -> None:
    job(service, status="running", fine_tuned_model=None)
    text = page.get("/jobs/ftjob-1/status").text
    assert 'hx-trigger="every 2s"' in text
    assert 'action="/jobs/ftjob-1/pause"' in text
    assert 'action="/jobs/ftjob-1/cancel"' in text
    assert page.get("/jobs/ftjob-1/curve").json()["ended"] is False
    assert 'hx-get="/jobs/list"' in page.get("/").text


def test_settings_left_to_the_server_are_told_once_they_are_settled(
    service: Any, page: Any
) -> None:
    auto = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")
    job(service, status="validating_files", fine_tuned_model=None, hyperparameters=auto)
    whole = page.get("/jobs/ftjob-1").text
    assert 'hx-get="/jobs/ftjob-1/asked"' in whole
    assert "Passes" not in whole
    settled = auto | {"n_epochs": 3, "batch_size": 11, "learning_rate_multiplier": 1.0}
    service.store.change_job("ftjob-1", when=("validating_files",), hyperparameters=settled)
    text = page.get("/jobs/ftjob-1/asked").text
    assert re.search(r"<dt>Rows in a step</dt><dd>11</dd>", text)
    assert "hx-get" not in text


def test_what_a_page_does_comes_from_the_page(service: Any, page: Any) -> None:
    job(service, status="running", fine_tuned_model=None)
    elsewhere = {"origin": "http://evil.example"}
    answer = page.post("/jobs/ftjob-1/cancel", headers=elsewhere)
    assert answer.status_code == 403
    assert service.store.get(JobRecord, "ftjob-1").status == "running"


def looked(page: Any, content: bytes, *, htmx: bool = True, **fields: str) -> Any:
    """The form as a browser sends it, with a file of these rows."""
    empty = dict.fromkeys(("suffix", "n_epochs", "r", "batch_size", "seed"), "")
    form = {"rows": "", **empty, "max_steps": "2", **fields}
    headers = {"hx-request": "true"} if htmx else {}
    return page.post(
        "/jobs/check", data=form, files={"file": ("rows.jsonl", content)}, headers=headers
    )


def row(answer: str, role: str = "assistant") -> bytes:
    turns = [{"role": "user", "content": "say red"}, {"role": role, "content": answer}]
    return json.dumps({"messages": turns}).encode() + b"\n"


def test_rows_are_seen_before_anything_starts(service: Any, page: Any) -> None:
    content = b"".join(row(f"<b>red</b> {i}") for i in range(20))
    answer = looked(page, content, r="2", hold_out="yes", suffix="reds")
    assert answer.status_code == 200, answer.text
    assert "It fits." in answer.text
    assert "rows.jsonl: 20 rows" in answer.text
    assert "files/file-" not in answer.text  # where the server keeps them
    assert '<mark class="trained">&lt;b&gt;red&lt;/b&gt; 0' in answer.text
    assert "<html" not in answer.text
    assert service.store.count(JobRecord, {}) == 0
    looked(page, content)  # again, with other settings
    assert service.store.count(FileRecord, {"deleted": 0}) == 1
    named = re.search(r'name="file_id" value="(file-[0-9a-f]+)"', answer.text)
    assert named is not None
    form = {"file_id": named[1], "suffix": "reds", "r": "2", "max_steps": "2", "hold_out": "yes"}
    begun = page.post("/jobs", data=form, headers={"hx-request": "true"})
    assert begun.status_code == 204, begun.text
    (made,) = service.store.all(JobRecord, {})
    assert begun.headers["hx-redirect"] == f"/jobs/{made.id}"
    assert (made.suffix, made.asked["lora"], made.asked["train"]) == (
        "reds",
        {"r": 2},
        {"max_steps": 2},
    )
    # The look and the job hold out the same rows, whatever the job's seed.
    assert made.asked["data"] == {"eval_fraction": 0.1, "split_seed": 0}
    assert page.post(f"/jobs/{made.id}/cancel", follow_redirects=False).status_code == 303
    assert service.store.get(JobRecord, made.id).status == "cancelled"


def test_time_is_told_where_this_machines_speed_is_known(
    page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"".join(row(f"red {i}") for i in range(20))
    page.get("/jobs/new")
    assert "Time, estimated" not in looked(page, content, hold_out="yes").text
    known = replace(named_device("cpu"), launch_s=1e-5, dequantized=1e9)
    monkeypatch.setattr("pennyweight.serve.pace.calibrated", lambda device, config: known)
    page.get("/jobs/new")  # whoever opens the form lets it be measured
    said = ""
    while "Time, estimated" not in said:
        said = looked(page, content, hold_out="yes").text
    assert re.search(r"Time, estimated</dt><dd>\d+ m?s<small>", said)


def test_the_list_tells_a_jobs_last_step_and_reads_no_more_than_that(
    service: Any, page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job(service, status="running", fine_tuned_model=None)
    read: list[int] = []
    listed = service.store.listed

    def counted(kind: Any, where: Any, **more: Any) -> Any:
        found = listed(kind, where, **more)
        read.extend([len(found[0])] if kind is EventRecord else [])
        return found

    steps = [
        EventRecord(
            f"s{i}",
            "ftjob-1",
            f"step {i}",
            0,
            "info",
            "metrics",
            "",
            {"step": i, "total_steps": 90, "train_loss": 1.0},
        )
        for i in range(3, 60)
    ]
    service.store.record_progress("ftjob-1", steps, lambda event: None)
    monkeypatch.setattr(service.store, "listed", counted)
    assert "step 59 of 90" in page.get("/jobs/list").text
    assert sum(read) < 8


def test_without_a_script_the_look_is_a_page_that_keeps_what_was_given(page: Any) -> None:
    answer = looked(page, b"".join(map(row, "abcdefgh")), htmx=False, suffix="kept-name")
    seen = Seen(answer.text)
    assert {field.get("value") for field in seen.all("input")} >= {"kept-name", "2"}
    assert 'formaction="/jobs"' in answer.text


def test_rows_that_cannot_be_trained_are_told_by_their_line(service: Any, page: Any) -> None:
    answer = looked(page, row("red") * 3 + row("x", role="assitant"))
    assert "rows.jsonl:4" in answer.text
    assert "did you mean" in answer.text
    assert "Start training" not in answer.text
    assert str(service.settings.data_path) not in answer.text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": "many"}, "Rank: found"),
        ({"n_epochs": "0"}, "Passes over the rows"),
        ({"suffix": "<b>"}, "Name"),
        ({"rows": "file-nobody"}, "no file"),
    ],
)
def test_what_a_form_cannot_be_is_said_in_its_place(
    page: Any, fields: dict[str, str], said: str
) -> None:
    answer = looked(page, row("red"), **fields)
    assert answer.status_code in (400, 404)
    assert said in answer.text
    assert "<html" not in answer.text


def test_the_example_rows_can_be_taken_and_downloaded(
    page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real ones are parsed out of the standard library, which takes seconds.
    made = [json.loads(row(f"red {i}")) for i in range(700)]
    monkeypatch.setattr(task, "rows", lambda split: iter(made))
    answer = page.get("/example.jsonl")
    assert [json.loads(line) for line in answer.text.splitlines()] == made[:600]
    assert "attachment" in answer.headers["content-disposition"]
    assert "example.jsonl" in looked(page, b"", rows="example").text


def test_an_adapter_of_a_folder_tells_what_its_receipt_tells(service: Any, page: Any) -> None:
    folder = service.versions.path("f" * 64)
    folder.mkdir(parents=True)
    told = {"held_out": {"rows": 9, "before": {"loss": 2.75}, "after": {"loss": 1.125}}}
    (folder / "receipt.json").write_text(json.dumps(told))
    service.store.name_model(ModelRecord("kept@prod", "alice", 1, "f" * 64, "tiny"))
    text = page.get("/adapters").text
    for said in ("kept@prod", "from a folder", "2.75", "1.125"):
        assert said in text
    forgotten = page.post("/adapters/forget", data={"id": "kept@prod"}, follow_redirects=False)
    assert forgotten.status_code == 303
    assert "kept@prod" not in page.get("/adapters").text
    assert page.post("/adapters/forget", data={"id": "kept@prod"}).status_code == 404


def test_usage_is_added_up_by_day(service: Any, page: Any) -> None:
    import time

    hour = int(time.time()) // 3600 * 3600
    used = {"owner": "alice", "model": "tiny", "tokens_in": 1000, "requests": 2}
    service.store.bill([Usage(hour=hour, **used), Usage(hour=hour - 1, **used)])
    text = page.get("/usage?days=7").text
    assert "2,000" in text
    assert "Cost" not in text
    assert page.get("/usage?days=0").status_code == 400


def test_files_of_the_page_are_kept_and_no_others_are_there(service: Any, page: Any) -> None:
    answer = page.get("/static/page.css")
    assert answer.status_code == 200
    assert "immutable" in answer.headers["cache-control"]
    for path in ("/static/vendor/README.md", "/static/../looks.py", "/static/%2e%2e/looks.py"):
        assert page.get(path).status_code == 404
    # What is vendored has its licence beside it, and is named.
    vendored = {p.name for p in (STATIC / "vendor").iterdir() if p.suffix in (".js", ".woff2")}
    told = (STATIC / "vendor" / "README.md").read_text(encoding="utf-8")
    for name in vendored:
        assert name in told
        assert (STATIC / "vendor" / f"{name.split('.')[0]}.LICENSE").is_file()


def test_figures_pass_over_what_is_no_number() -> None:
    events = [
        EventRecord("1", "j", "a", 0, "info", "metrics", "", {"step": 1, "train_loss": 2.0}),
        EventRecord("2", "j", "b", 0, "info", "metrics", "", {"step": "x", "train_loss": 1.0}),
        EventRecord("3", "j", "c", 0, "info", "metrics", "", {"step": 2, "train_loss": "nan"}),
        EventRecord("4", "j", "d", 0, "info", "message", "", {"step": 3, "train_loss": 1.0}),
    ]
    assert figures_of(events).table() == [(1, 2.0, None)]
