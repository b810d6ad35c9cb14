"""What a server can be told: one YAML file, every key optional, and the options of the command line.

The text under each field says what it does; unknown keys are refused with the nearest name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pennyweight.config import BaseConfig, LoraConfig, public_name
from pennyweight.config.document import read_document, spell
from pennyweight.data.read import nearest
from pennyweight.errors import ConfigError
from pennyweight.plan import parse_memory

__all__ = [
    "ChatLimits",
    "JobDefaults",
    "MemoryLimits",
    "Prices",
    "RequestLimits",
    "ServeSettings",
    "load_settings",
]

MOST_BYTES = 1 << 20


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class JobDefaults(_Frozen):
    """How fine-tuning jobs are run where a request does not say."""

    running: Annotated[int, Field(ge=1, le=64)] = 2
    """Jobs that train at the same time, in turns; further ones wait."""

    live_per_key: Annotated[int, Field(ge=1)] = 100
    """Jobs of one key that have not ended; one more is answered with 429."""

    learning_rate: Annotated[float, Field(gt=0, lt=10)] = 2e-4
    """What `learning_rate_multiplier` multiplies."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens; a longer one is cut, counted and reported."""

    epochs: Annotated[int, Field(ge=1, le=50)] = 3
    """Passes over the rows where `n_epochs` is auto."""

    adapter: LoraConfig = LoraConfig()
    """The adapter of a job that does not describe its own."""

    max_rank: Annotated[int, Field(ge=1, le=4096)] = 256
    """The highest rank a request may ask for."""


class ChatLimits(_Frozen):
    """What is answered at once, and what waits."""

    rows: Annotated[int, Field(ge=1, le=1024)] = 16
    """Answers under way at the same time."""

    waiting: Annotated[int, Field(ge=0)] = 64
    """Answers that may wait for a row; one more is answered with 429."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 4096
    """The longest answer, whatever a request asks for."""

    dense_weights: bool = False
    """Hold a quantized base dequantized as well, so that answers dequantize nothing: on a GPU with memory to spare. A CPU multiplies straight from the codes as fast."""

    control_tokens: Literal["refuse", "allow"] = "refuse"
    """What happens to a message whose text holds one of the tokenizer's control tokens, such as `<|im_end|>`, which could pass for the end of a turn."""

    resident_adapters: Annotated[int, Field(ge=1)] = 64
    """Adapters kept in memory at the most, those included that rest in host memory beside a card; the one longest unused is read from its folder again when it is asked. `memory` may keep fewer."""


class MemoryLimits(_Frozen):
    """One account for adapters, keys and values of answers, and jobs; what does not fit waits."""

    limit: str | None = None
    """Memory beside the base, such as `6GB`. None: nine tenths of what the device has left once the base is loaded."""

    answers: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """The part of it that jobs never take: two thirds of it for keys and values, one for adapters. An answer or an adapter that needs more than its part is refused, for it might wait for ever."""

    @field_validator("limit")
    @classmethod
    def _is_a_size(cls, limit: str | None) -> str | None:
        if limit is not None:
            parse_memory(limit)
        return limit


class RequestLimits(_Frozen):
    """How large and how slow a request may be."""

    body_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    """Largest JSON body."""

    file_bytes: Annotated[int, Field(ge=1024)] = 512 << 20
    """Largest uploaded file."""

    header_bytes: Annotated[int, Field(ge=1024)] = 32 << 10
    """Largest head of a request."""

    nesting: Annotated[int, Field(ge=4, le=200)] = 64
    """Deepest JSON."""

    head_seconds: Annotated[float, Field(gt=0)] = 10
    """Within which the head of a request has to be here."""

    body_seconds: Annotated[float, Field(gt=0)] = 30
    """Longest silence while a body comes, and while a client takes in nothing of its answer."""

    connections: Annotated[int, Field(ge=1)] = 512
    """Connections at the same time; what comes beyond is closed at once."""


class Prices(_Frozen):
    """What `GET /v1/usage` multiplies by; all zero where nothing is charged."""

    currency: str = "USD"
    """Named in the answer."""

    trained_per_million: Annotated[float, Field(ge=0)] = 0
    """A million tokens trained."""

    evaluated_per_million: Annotated[float, Field(ge=0)] = 0
    """A million tokens of held-out rows measured during training."""

    input_per_million: Annotated[float, Field(ge=0)] = 0
    """A million prompt tokens."""

    output_per_million: Annotated[float, Field(ge=0)] = 0
    """A million generated tokens."""

    device_hour: Annotated[float, Field(ge=0)] = 0
    """An hour of the device, shared by token share."""


class ServeSettings(_Frozen):
    """A whole server."""

    base: BaseConfig = BaseConfig()
    """The model that everything else stands beside."""

    model_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """What the base is called by those who ask it; None: its id, or its folder's name."""

    adapters: str | None = None
    """A folder of adapters, each served by the name of its folder."""

    load_from: tuple[str, ...] = ()
    """Folders from which `POST /v1/load_lora_adapter` may load; `adapters` is always one."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen at. Others than this machine's own need keys that were given."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0: any free one, which is said."""

    data_dir: Annotated[str, Field(min_length=1)] = "runs/serve"
    """Where files, jobs, adapters and usage are kept; the same folder again goes on."""

    keys: str | None = None
    """A file of keys, a line each: `NAME KEY`, or `NAME KEY admin`. None: $PENNYWEIGHT_API_KEY, else one is made."""

    store: Annotated[str, Field(pattern=r"^postgres(ql)?://")] | None = None
    """Address of a Postgres database (extra `postgres`) in place of SQLite in `data_dir`."""

    chat_weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """The share of tokens that chat gets beside each job of normal priority, while both have work."""

    drain_seconds: Annotated[float, Field(gt=0, le=300)] = 25
    """After SIGTERM: how long answers may go on before they are cut off."""

    jobs: JobDefaults = JobDefaults()
    """How jobs are run where a request does not say."""

    chat: ChatLimits = ChatLimits()
    """What is answered at once, and what waits."""

    memory: MemoryLimits = MemoryLimits()
    """The device's memory beside the base, and what of it is kept for answers."""

    limits: RequestLimits = RequestLimits()
    """How large and how slow a request may be."""

    prices: Prices = Prices()
    """What usage costs."""

    @property
    def base_id(self) -> str:
        """The id that the base is asked by."""
        return self.model_name or public_name(self.base.model)

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser().resolve()


def load_settings(path: Path | None, given: Mapping[str, Any]) -> ServeSettings:
    """The file's settings, with what the command line gives (`base.model`) in place of theirs.

    ConfigError with every fault, one a line.
    """
    tree: dict[str, Any] = {}
    lines: Mapping[tuple[Any, ...], int] = {}
    name = "command line"
    if path is not None:
        name = path.name
        try:
            with path.open("rb") as file:
                document = read_document(file.read(MOST_BYTES).decode("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as fault:
            raise ConfigError(f"{path}: cannot be read: {fault}") from None
        if document.faults:
            raise ConfigError.all(f"{name}:{line}: {said}" for line, said in document.faults)
        if not isinstance(document.tree or {}, dict):
            raise ConfigError(f"{name}: settings by their names belong here, such as `port: 8000`")
        tree, lines = dict(document.tree or {}), document.lines
    for key, value in given.items():
        group, _, field = key.rpartition(".")
        if group:
            inner = tree.get(group)
            tree[group] = {**(inner if isinstance(inner, dict) else {}), field: value}
        else:
            tree[field] = value
    try:
        return ServeSettings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError.all(
            _said(each["loc"], each["type"], each["msg"], name, lines) for each in error.errors()
        ) from None


def _said(
    where: tuple[Any, ...], kind: str, message: str, name: str, lines: Mapping[Any, int]
) -> str:
    line = next((lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), None)
    place = f"{name}:{line}" if line else name
    if kind == "extra_forbidden":
        near = nearest(where[-1], _names(where[:-1]))
        return f"{place}: {spell(where)}: no such setting{near}"
    return f"{place}: {spell(where)}: {message}"


def _names(group: tuple[Any, ...]) -> list[str]:
    kind: Any = ServeSettings
    for part in group:
        field = getattr(kind, "model_fields", {}).get(part)
        kind = getattr(field, "annotation", None)
    return list(getattr(kind, "model_fields", {}))
