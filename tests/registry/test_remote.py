"""What is pulled is what was pushed: through a folder, fsspec addresses and a stand-in for the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pennyweight.errors import AdapterError, ConfigError, DiskError
from pennyweight.registry import Registry, pull, push
from pennyweight.registry.record import RECORD


@pytest.fixture
def elsewhere(tmp_path: Path) -> Registry:
    """Another machine's registry."""
    return Registry(tmp_path / "elsewhere")


@pytest.fixture(params=["folder", "file://", "memory://"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory://":
        pytest.importorskip("fsspec")
        return f"memory://{uuid4()}/sql"
    return ("file://" if request.param == "file://" else "") + str(tmp_path / "there" / "sql")


def test_there_and_back(
    registry: Registry, elsewhere: Registry, adapter_at: Any, target: str
) -> None:
    parent = registry.add(adapter_at("parent", seed=7), name="old")
    version = registry.add(adapter_at("one"), name="sql", parent="old")
    sent = push(version, target)
    assert (sent.version, push(version, target)) == (version.hash, sent)
    back = pull(elsewhere, target, name="mine", tags=("prod",), expect=version.short)
    assert back.to_dict() == version.to_dict()
    assert back.parent == parent.hash
    assert elsewhere.resolve("mine@prod") == back
    other = registry.add(adapter_at("two", seed=2), name="sql")
    with pytest.raises(ConfigError, match=f"version {version.short} lies there"):
        push(other, target)
    with pytest.raises(AdapterError, match="was expected"):
        pull(elsewhere, target, name="mine", expect=other.hash)
    push(other, target, replace=True)
    assert pull(elsewhere, target, name="mine") == elsewhere.resolve(other.hash)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md", "adapter_config.json"])
def test_what_changed_on_its_way_is_refused(
    registry: Registry, elsewhere: Registry, adapter_at: Any, tmp_path: Path, name: str
) -> None:
    place = tmp_path / "place"
    push(registry.add(adapter_at("one"), name="sql"), str(place))
    raw = bytearray((place / name).read_bytes())
    raw[-9] ^= 1
    (place / name).write_bytes(raw)
    with pytest.raises(AdapterError):
        pull(elsewhere, str(place), name="sql")
    assert elsewhere.names() == []


def test_an_adapter_from_elsewhere_needs_no_record(
    registry: Registry, adapter_at: Any, tmp_path: Path
) -> None:
    version = pull(registry, str(adapter_at("foreign", loss=None)), name="foreign")
    assert version.held_out() is None
    with pytest.raises(ConfigError, match="no adapter there"):
        pull(registry, (tmp_path / "nothing").as_uri(), name="x")


def test_a_damaged_version_is_not_pushed(
    registry: Registry, adapter_at: Any, tmp_path: Path
) -> None:
    version = registry.add(adapter_at("one"), name="sql")
    (version.folder / "README.md").write_text("else")
    with pytest.raises(DiskError, match=r"README\.md"):
        push(version, str(tmp_path / "place"))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("owner/name", "hf://owner/name"),
        ("hf://name", "hf://owner/name"),
        ("nosuch://bucket/x", "nosuch"),
    ],
)
def test_addresses_are_said_plainly(
    registry: Registry, adapter_at: Any, address: str, said: str
) -> None:
    version = registry.add(adapter_at("one"), name="sql")
    for act in (lambda: push(version, address), lambda: pull(registry, address, name="x")):
        with pytest.raises(ConfigError, match=said):
            act()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP as push and pull use; commits are kept in memory."""

    commits: dict[str, dict[str, bytes]]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: Any = None, *, code: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(raw)
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.commits["asked privately" if private else "asked publicly"] = {}
            self.answer({"url": "http://127.0.0.1/owner/sql", "name": "owner/sql"})
        elif self.path == "/api/validate-yaml":  # of the model card
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            told = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": each["path"], **told} for each in json.loads(raw)["files"]]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in raw.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            oid = hashlib.sha1(raw).hexdigest()
            self.commits[oid] = files
            self.commits["main"] = files
            self.answer({"commitOid": oid, "commitUrl": f"http://127.0.0.1/owner/sql/commit/{oid}"})
        else:
            self.answer({"error": f"unknown {self.path}"}, code=404)

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        oids = {key for key in self.commits if re.fullmatch("[0-9a-f]{40}", key)}
        if match := re.fullmatch(r"/api/models/owner/sql(?:/revision/(\w+))?", path):
            at = match[1] or "main"
            if at not in self.commits:
                return self.answer({"error": "no such revision"}, code=404)
            names = [{"rfilename": name} for name in self.commits[at]]
            oid = next(o for o in oids if self.commits[o] is self.commits[at])
            return self.answer({"id": "owner/sql", "sha": oid, "siblings": names})
        if match := re.fullmatch(r"/api/models/owner/sql/tree/(\w+)", path):
            files = self.commits[match[1]].items()
            rows = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files]
            return self.answer(rows)
        if match := re.fullmatch(r"/owner/sql/resolve/(\w+)/(.+)", path):
            body = self.commits[match[1]][match[2]]
            oid = next(o for o in oids if self.commits[o] is self.commits[match[1]])
            mark = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.answer(body, ETag=mark, X_Repo_Commit=oid)
        return self.answer({"error": f"unknown {path}"}, code=404)

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, dict[str, bytes]]]:
    """A Hub on this machine that huggingface_hub talks to; gives its commits."""
    from huggingface_hub import constants

    commits: dict[str, dict[str, bytes]] = {}
    handler = type("Handler", (Hub,), {"commits": commits})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield commits
    server.shutdown()
    server.server_close()


def test_the_hub_there_and_back(
    registry: Registry, elsewhere: Registry, adapter_at: Any, hub: dict[str, dict[str, bytes]]
) -> None:
    version = registry.add(adapter_at("one"), name="sql")
    sent = push(version, "hf://owner/sql")
    assert "asked privately" in hub
    assert set(hub["main"]) == {*version.files, RECORD}
    assert (
        hub["main"]["adapter_config.json"] == (version.folder / "adapter_config.json").read_bytes()
    )
    second = registry.add(adapter_at("two", seed=2), name="sql")
    assert push(second, "hf://owner/sql").address != sent.address
    # The address of a push names just that push, whatever came after it.
    assert pull(elsewhere, sent.address, name="sql").to_dict() == version.to_dict()
    assert pull(elsewhere, "hf://owner/sql", name="sql").hash == second.hash
    with pytest.raises(ConfigError, match="the Hub did not do it"):
        pull(elsewhere, "hf://owner/other", name="sql")
