"""`/v1/files`: rows to train on, uploaded and read back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from pennyweight.serve.api.caller import Asks
from pennyweight.serve.api.wire import Deleted, FileObject, Page, file_object, page
from pennyweight.serve.records import FileRecord
from pennyweight.serve.refusals import absent, invalid
from pennyweight.serve.service import Service

__all__ = ["router"]

router = APIRouter(tags=["files"])
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            }
        },
    }
}


@router.post("/files", openapi_extra=_FORM)
async def create_file(request: Request, caller: Asks) -> FileObject:
    """Upload JSONL rows. They are judged by the job that trains on them, not here."""
    service: Service = request.app.state.service
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise invalid(
            "send the file as multipart/form-data, with `file` and `purpose`", param="file"
        )
    async with request.form(max_files=1, max_fields=16, max_part_size=4096) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise invalid("file: missing from the form", param="file")
        if not isinstance(purpose, str):
            raise invalid("purpose: missing from the form; use fine-tune", param="purpose")
        record = await run_in_threadpool(
            service.uploads.create, caller.name, file.filename or "rows.jsonl", purpose, file.file
        )
    return file_object(record)


@router.get("/files", response_model=Page[FileObject])
def list_files(
    request: Request,
    caller: Asks,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Any:
    """The key's files, newest first."""
    service: Service = request.app.state.service
    where: dict[str, Any] = {"owner": caller.name, "deleted": 0}
    if purpose is not None:
        where["purpose"] = purpose
    try:
        found, more = service.store.listed(
            FileRecord, where, after=after, limit=limit, newest_first=order == "desc"
        )
    except KeyError:
        raise absent("file", after or "", param="after") from None
    return page([file_object(each) for each in found], more)


@router.get("/files/{file_id}")
def get_file(request: Request, caller: Asks, file_id: str) -> FileObject:
    service: Service = request.app.state.service
    return file_object(service.uploads.get(caller.name, file_id))


@router.get(
    "/files/{file_id}/content",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def get_content(request: Request, caller: Asks, file_id: str) -> StreamingResponse:
    """The bytes as they were uploaded."""
    service: Service = request.app.state.service
    file = service.uploads.get(caller.name, file_id)
    headers = {"content-length": str(file.bytes)}
    return StreamingResponse(
        service.uploads.blocks(file), headers=headers, media_type="application/octet-stream"
    )


@router.delete("/files/{file_id}")
def delete_file(request: Request, caller: Asks, file_id: str) -> Deleted:
    """A job under way keeps what it reads."""
    service: Service = request.app.state.service
    service.uploads.delete(caller.name, file_id)
    return Deleted(id=file_id, object="file", deleted=True)
