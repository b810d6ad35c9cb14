"""`/v1/chat/completions` and `/v1/completions`, whole or streamed."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from pennyweight.serve.api.answers import Chat, Telling, Text, answered
from pennyweight.serve.api.body import body_of, described_by
from pennyweight.serve.api.caller import Asks
from pennyweight.serve.questions import How
from pennyweight.serve.refusals import invalid
from pennyweight.serve.service import Service

__all__ = ["router"]

router = APIRouter(tags=["answers"])

MOST_STOPS, MOST_CHOICES, MOST_PROMPTS = 16, 16, 64

_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Object = dict[str, Any]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Asked(BaseModel):
    """What both routes read."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: Annotated[str, Field(min_length=1, max_length=300)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: _Object | None = None
    user: Any = None
    metadata: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def told(self) -> Telling:
        if not self.stream:
            return "whole"
        usage = self.stream_options is not None and self.stream_options.include_usage
        return "streamed with usage" if usage else "streamed"

    def unsupported(self) -> list[str]:
        """What would change the answer and is not done here."""
        found = [name for name in ("frequency_penalty", "presence_penalty") if getattr(self, name)]
        return found + (["logit_bias"] if self.logit_bias else [])


class AskChat(_Asked):
    """A chat completion, as OpenAI's clients send it."""

    messages: Annotated[list[_Object], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[_Object] | None = None
    tool_choice: Any = None
    response_format: _Object | None = None
    modalities: list[str] | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    # Read and passed over: they say who asks, where and how fast, nothing of the answer.
    prediction: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    def unsupported(self) -> list[str]:
        found = super().unsupported()
        if self.response_format and self.response_format.get("type", "text") != "text":
            found.append("response_format")
        if self.tool_choice not in (None, "auto", "none"):
            found.append("tool_choice")
        if self.modalities not in (None, ["text"]):
            found.append("modalities")
        others = ("audio", "functions", "function_call", "web_search_options")
        return found + [name for name in others if getattr(self, name)]


class AskCompletion(_Asked):
    """A text completion, as OpenAI's clients send it."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def unsupported(self) -> list[str]:
        found = super().unsupported()
        found += [name for name in ("echo", "suffix") if getattr(self, name)]
        if self.best_of not in (None, 1) and self.best_of != self.n:
            found.append("best_of")
        return found

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)  # type: ignore[arg-type]


class ChoiceUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionObject(BaseModel):
    """Either kind of completion; a chat's choices hold a `message`, the others a `text`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: ChoiceUsage


_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


@router.post(
    "/chat/completions",
    response_model=CompletionObject,
    responses=_STREAMED,
    openapi_extra=described_by(AskChat),
)
async def chat(request: Request, caller: Asks) -> Any:
    """Answer messages, rendered as the model's training rendered them."""
    service: Service = request.app.state.service
    asked = await body_of(request, AskChat, service.settings.limits.nesting)
    how = _how(asked, asked.max_completion_tokens, asked.top_logprobs or 0, bool(asked.logprobs))
    tools = None if asked.tool_choice == "none" else asked.tools

    def render() -> Any:
        model = service.catalogue.get(caller.name, asked.model, param="model")
        return service.questions.chat(caller.name, model, asked.messages, tools, how)

    question = await run_in_threadpool(render)
    return await answered(request, service.questions.ask(question), Chat(asked.model), asked.told)


@router.post(
    "/completions",
    response_model=CompletionObject,
    responses=_STREAMED,
    openapi_extra=described_by(AskCompletion),
)
async def complete(request: Request, caller: Asks) -> Any:
    """Continue text as it stands; an adapter trained on prompts is asked as it was trained."""
    service: Service = request.app.state.service
    asked = await body_of(request, AskCompletion, service.settings.limits.nesting)
    how = _how(asked, None, asked.logprobs or 0, asked.logprobs is not None)
    prompts = asked.prompts
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise invalid(f"prompt: from 1 to {MOST_PROMPTS} prompts at once", param="prompt")

    def render() -> Any:
        model = service.catalogue.get(caller.name, asked.model, param="model")
        return service.questions.completion(caller.name, model, prompts, how)

    question = await run_in_threadpool(render)
    return await answered(request, service.questions.ask(question), Text(asked.model), asked.told)


def _how(asked: _Asked, most: int | None, top_logprobs: int, logprobs: bool) -> How:
    if top_logprobs and not logprobs:
        raise invalid("top_logprobs: needs logprobs: true", param="top_logprobs")
    if unsupported := asked.unsupported():
        raise invalid(
            f"{', '.join(unsupported)}: not done here, and would change the answer: leave it out",
            param=unsupported[0],
            code="unsupported_parameter",
        )
    return How(
        max_new_tokens=asked.max_tokens if most is None else most,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(0, asked.top_k or 0),
        seed=asked.seed,
        choices=asked.n or 1,
        stops=asked.stops,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
    )
