"""Messages as the OpenAI API writes them, read strictly: every fault names its field and the mend."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pennyweight.data.conversation import Message
from pennyweight.data.read import nearest
from pennyweight.errors import DataError

__all__ = [
    "RowRefusedError",
    "chat_messages",
    "found_text",
    "parsed_message",
    "parsed_messages",
    "parsed_tool_calls",
    "parsed_tools",
    "parsed_train",
    "type_name",
    "wire_message",
]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class RowRefusedError(ValueError):
    """One row that cannot be read; the message is `field: what, mend`."""


def chat_messages(
    rows: Sequence[Message | Mapping[str, Any]], *, where: str = "messages"
) -> tuple[Message, ...]:
    """Messages as the OpenAI API writes them; DataError names the field of the first fault."""
    try:
        return parsed_messages(rows, where)
    except RowRefusedError as refused:
        raise DataError(str(refused)) from refused


def parsed_messages(rows: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise RowRefusedError(f"{where}: {found_text(rows)}; expected a list of messages")
    return tuple(
        m if isinstance(m, Message) else parsed_message(m, f"{where}[{i}]")
        for i, m in enumerate(rows)
    )


def wire_message(message: Message) -> dict[str, Any]:
    """A message as the OpenAI API writes it, ready for JSON; `parsed_message` reads it back."""
    row: dict[str, Any] = {"role": message.role, "content": message.content, **message.extra}
    if "tool_calls" in row:
        row["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_json(call["function"])}}
            for call in row["tool_calls"]
        ]
    return row


def _as_json(function: Mapping[str, Any]) -> str:
    """The arguments of a call as the text that the API carries."""
    arguments = function["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def parsed_message(row: Any, where: str) -> Message:
    if not isinstance(row, Mapping):
        raise RowRefusedError(
            f"{where}: {found_text(row)}; expected an object with role and content"
        )
    if "role" not in row:
        hint = nearest("role", [str(k) for k in row])
        raise RowRefusedError(f"{where}.role: missing{hint or '; add it: user or assistant'}")
    role = row["role"]
    if role not in ROLES:
        hint = nearest(role, ROLES) or f"; expected one of {', '.join(ROLES)}"
        raise RowRefusedError(f"{where}.role: {found_text(role)}{hint}")
    content, extra = _content(row, where)
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
        if (value := row.get(name)) is not None:
            if not isinstance(value, str):
                raise RowRefusedError(f"{where}.{name}: {found_text(value)}; expected text")
            extra[name] = value
    if reasoning := next(
        (extra[n] for n in ("reasoning_content", "thinking", "reasoning") if n in extra), None
    ):
        extra |= {"reasoning_content": reasoning, "thinking": extra.get("thinking", reasoning)}
    if (calls := row.get("tool_calls")) is not None:
        extra["tool_calls"] = parsed_tool_calls(calls, f"{where}.tool_calls")
    return Message(role, content, parsed_train(row, role, where), extra)


def _content(row: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    content = row.get("content")
    if isinstance(content, str):
        return content, {}
    if content is None:
        if row.get("tool_calls") or row.get("reasoning_content"):
            return "", {}
        near = nearest("content", [str(k) for k in row if k != "role"])
        raise RowRefusedError(f"{where}.content: missing{near or '; add the text'}")
    if not isinstance(content, list):
        raise RowRefusedError(
            f"{where}.content: {found_text(content)}; expected text or a list of parts"
        )
    texts: list[str] = []
    extra: dict[str, Any] = {}
    for i, part in enumerate(content):
        here = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get("text", part.get("value")) if isinstance(part, Mapping) else part
        if not isinstance(value, str) or kind not in (None, "text", "reasoning", "tool_call"):
            raise RowRefusedError(
                f"{here}: {found_text(kind or part)}; only text can be trained on here"
            )
        if kind == "reasoning":
            extra["reasoning_content"] = value
        elif kind == "tool_call":
            extra.setdefault("tool_calls", []).extend(parsed_tool_calls(value, here))
        else:
            texts.append(value)
    return "".join(texts), extra


def parsed_train(row: Mapping[str, Any], role: str, where: str) -> bool | None:
    for name in ("weight", "loss_weight", "train", "training"):
        value = row.get(name)
        if value is None:
            continue
        if value not in (0, 1) or isinstance(value, str):
            raise RowRefusedError(f"{where}.{name}: {found_text(value)}; expected 0 or 1")
        if value and role != "assistant":
            raise RowRefusedError(
                f"{where}.{name}: 1 on a {role} message; only answers are trained"
            )
        return bool(value)
    return None


def parsed_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls as chat templates read them: type, function.name, function.arguments as an object."""
    calls = _from_json(calls, where)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise RowRefusedError(f"{where}: {found_text(calls)}; expected a list of calls")
    parsed = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowRefusedError(
                f"{where}[{i}]: {found_text(call)}; expected a function with a name"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            # What is not JSON stays the text it is; the template prints it so.
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        kept = {"name": function["name"], "arguments": arguments}
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        parsed.append({**identity, "type": "function", "function": kept})
    return parsed


def parsed_tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    tools = _from_json(row.get("tools"), "tools") if row.get("tools") else None
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowRefusedError(f"tools: {found_text(tools)}; expected a list of JSON schemas")
    wrapped = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return tuple(wrapped) or None


def _from_json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowRefusedError(f"{where}: text that is not JSON ({error})") from error


def type_name(value: Any) -> str:
    names = {type(None): "null", str: "text", list: "list", dict: "object", bool: "true/false"}
    return names.get(type(value), "number" if isinstance(value, int | float) else "value")


def found_text(value: Any) -> str:
    """`"assitant"`, `null`, `a list`: what stands there, short."""
    if isinstance(value, str):
        return f'"{value[:40]}"'
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return f"a {type_name(value)}"
