"""`/v1/models`, and vLLM's routes to load and unload an adapter."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from pennyweight.serve.api.body import body_of, described_by
from pennyweight.serve.api.caller import Asks
from pennyweight.serve.api.wire import Deleted, ModelObject, Page, model_object, page
from pennyweight.serve.service import Service

__all__ = ["router"]

router = APIRouter(tags=["models"])


class LoadAdapter(BaseModel):
    """As vLLM reads it."""

    model_config = ConfigDict(extra="ignore", strict=True)
    lora_name: Annotated[str, Field(min_length=1, max_length=64)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapter(BaseModel):
    """As vLLM reads it."""

    model_config = ConfigDict(extra="ignore", strict=True)
    lora_name: Annotated[str, Field(min_length=1, max_length=64)]


@router.get("/models", response_model=Page[ModelObject])
def list_models(request: Request, caller: Asks) -> Any:
    """The base, the key's own adapters and checkpoints, and those of the adapters' folder."""
    service: Service = request.app.state.service
    return page([model_object(each) for each in service.catalogue.listed(caller.name)])


@router.get("/models/{model_id:path}")
def get_model(request: Request, caller: Asks, model_id: str) -> ModelObject:
    service: Service = request.app.state.service
    return model_object(service.catalogue.get(caller.name, model_id))


@router.delete("/models/{model_id:path}")
def delete_model(request: Request, caller: Asks, model_id: str) -> Deleted:
    """Forget one of the key's own adapters."""
    service: Service = request.app.state.service
    service.catalogue.delete(caller.name, model_id)
    return Deleted(id=model_id, object="model", deleted=True)


@router.post(
    "/load_lora_adapter",
    response_class=PlainTextResponse,
    openapi_extra=described_by(LoadAdapter),
    tags=["adapters"],
)
async def load_adapter(request: Request, caller: Asks) -> PlainTextResponse:
    """Serve the adapter in a folder, which lies under one that the server allows."""
    service: Service = request.app.state.service
    asked = await body_of(request, LoadAdapter, service.settings.limits.nesting)
    await run_in_threadpool(service.catalogue.load, caller.name, asked.lora_name, asked.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    response_class=PlainTextResponse,
    openapi_extra=described_by(UnloadAdapter),
    tags=["adapters"],
)
async def unload_adapter(request: Request, caller: Asks) -> PlainTextResponse:
    """Serve it no longer."""
    service: Service = request.app.state.service
    asked = await body_of(request, UnloadAdapter, service.settings.limits.nesting)
    await run_in_threadpool(service.catalogue.unload, caller.name, asked.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
