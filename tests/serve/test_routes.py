"""Every route: its key, its faults in the shape of the API, and files as a client handles them."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")


from pennyweight.serve.api.app import routes_of

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def upload(client: Any, content: bytes = b'{"a": 1}\n', name: str = "rows.jsonl") -> dict[str, Any]:
    found = client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"})
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


def paths_of(service: Any) -> set[str]:
    """Every path that the router knows: those of the document, and those of pages."""
    pages = {route.path for router in service.pages for route in router.routes}
    return {*routes_of(service).openapi()["paths"], "/v1/openapi.json"} | pages


def test_every_route_and_method_without_a_key_is_401_bar_healthz(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started()
    nobody = client_of(service, None)
    paths = paths_of(service)
    assert len(paths) > 15
    for path, method in itertools.product([*sorted(paths), "/", "/v1/no-such"], METHODS):
        for head in ({}, {"authorization": "Bearer wrong"})[: 1 + (method == "POST")]:
            found = nobody.request(method, path, headers=head)
            if path != "/healthz":
                assert found.status_code == 401, (method, path)
                if method != "HEAD":
                    assert found.json()["error"]["code"] == "invalid_api_key"
            assert found.headers["x-request-id"]
    assert nobody.get("/healthz").json() == {"status": "ok"}


def test_faults_have_the_shape_of_the_api(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started())
    cases = {
        404: client.get("/v1/no-such"),
        405: client.put("/v1/files"),
        400: client.post("/v1/chat/completions", content=b"{"),
        413: client.post("/v1/chat/completions", content=b" " * (9 << 20)),
    }
    for status, found in cases.items():
        assert found.status_code == status
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/v1/files?limit=0").json()["error"]["param"] == "limit"


def test_a_file_is_kept_listed_read_and_deleted(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started()
    alice, bob = client_of(service, "alice"), client_of(service, "bob")
    content = b'{"messages": []}\n' * 3
    files = [upload(alice, content, f"rows{n}.jsonl") for n in range(3)]
    assert files[0]["bytes"] == len(content)
    listed = alice.get("/v1/files").json()
    assert [file["id"] for file in listed["data"]] == [file["id"] for file in files[::-1]]
    page = alice.get(f"/v1/files?order=asc&limit=1&after={files[0]['id']}").json()
    assert ([file["id"] for file in page["data"]], page["has_more"]) == ([files[1]["id"]], True)
    named = f"/v1/files/{files[0]['id']}"
    assert alice.get(named).json() == files[0]
    assert alice.get(f"{named}/content").content == content
    # Another key's file is not there.
    assert bob.get("/v1/files").json()["data"] == []
    for found in (bob.get(named), bob.get(f"{named}/content"), bob.delete(named)):
        assert found.status_code == 404
    assert alice.delete(named).json() == {"id": files[0]["id"], "object": "file", "deleted": True}
    assert alice.get(named).status_code == 404
    kept = {folder.name for folder in (service.settings.data_path / "files").iterdir()}
    assert kept == {files[1]["id"], files[2]["id"]}


def test_no_name_of_a_file_leads_anywhere(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    service = started()
    client = client_of(service)
    for name in ("../../etc/passwd", "a/b\\c.jsonl", ".hidden", "\u202e.jsonl", "x" * 400, "nul\n"):
        record = service.uploads.get("alice", upload(client, name=name)["id"])
        path = service.uploads.path(record)
        assert path.parent == service.settings.data_path / "files" / record.id
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,90}", path.name)


def test_a_form_is_refused_where_it_is_not_whole(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    client = client_of(started(limits={"file_bytes": 1024}))
    purpose = {"purpose": "fine-tune"}
    assert client.post("/v1/files", data=purpose).status_code == 400
    assert client.post("/v1/files", files={"file": b"x"}).status_code == 400
    assert (
        client.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"}).status_code == 400
    )
    two = [("file", ("a", b"x")), ("file", ("b", b"y"))]
    assert client.post("/v1/files", files=two, data=purpose).status_code == 400
    large = client.post("/v1/files", files={"file": b"x" * 100_000}, data=purpose)
    assert large.status_code == 413
    head = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/v1/files", content=b"nonsense", headers=head).status_code == 400
    assert client.get("/v1/files").json()["data"] == []


def test_a_full_disk_is_507_wherever_an_upload_meets_it(
    started: Callable[..., Any], client_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = started()
    client = client_of(service)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def full_too(*_: Any) -> None:
        full()

    for place, name, how in (
        ("starlette.datastructures.UploadFile", "write", full_too),
        ("pennyweight.serve.uploads", "whole", full),
    ):
        with monkeypatch.context() as once:
            once.setattr(f"{place}.{name}", how)
            content = {"file": ("rows.jsonl", b"{}\n" * 1_000_000)}
            found = client.post("/v1/files", files=content, data={"purpose": "fine-tune"})
        assert (found.status_code, found.json()["error"]["code"]) == (507, "disk")
        assert int(found.headers["retry-after"]) > 0
    assert list((service.settings.data_path / "files").iterdir()) == []


def test_the_document_names_no_answer_that_is_never_given(
    started: Callable[..., Any], client_of: Callable[..., Any]
) -> None:
    described = client_of(started()).get("/v1/openapi.json").json()
    assert "422" not in str(described)
    operations = [op for path in described["paths"].values() for op in path.values()]
    assert len(operations) > 18
    assert all({"200", "400", "401", "404", "429"} <= set(op["responses"]) for op in operations)
    refusals = [
        answer for op in operations for code, answer in op["responses"].items() if code[0] > "3"
    ]
    assert {kind for answer in refusals for kind in answer["content"]} == {"application/json"}
