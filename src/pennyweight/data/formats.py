"""Raw rows to conversations: one small reader for each format people publish.

A reader takes one row and gives its conversation, or raises RowRefusedError with
`field: what was found, the mend`. Formats: `chat` (OpenAI), `alpaca`, `sharegpt`, `openassistant`,
`prompt_completion`, `text`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pennyweight.data.conversation import Conversation, Message
from pennyweight.data.messages import (
    RowRefusedError,
    found_text,
    parsed_message,
    parsed_messages,
    parsed_tool_calls,
    parsed_tools,
    parsed_train,
    type_name,
)
from pennyweight.data.read import nearest

__all__ = ["FORMATS", "RowRefusedError", "as_conversation", "detect", "renamed"]

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "bing": "assistant",
    "bard": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
# Pairs of columns that mean prompt and completion, the project's own names first.
_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("instruction", "response"), ("input", "output"),
)  # fmt: skip


def detect(row: Any) -> str:
    """The format of a row by its keys; RowRefusedError where none fits."""
    if isinstance(row, str):
        return "text"
    if not isinstance(row, Mapping):
        raise RowRefusedError(f"a {type_name(row)}, not an object with named fields")
    _refuse_preferences(row)
    keys = set(row)
    if "messages" in keys:
        return "chat"
    if "conversations" in keys or "conversation" in keys:
        return "sharegpt"
    if "message_tree_id" in keys or {"message_id", "parent_id", "role"} <= keys:
        return "openassistant"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if _pair(row):
        return "prompt_completion"
    if "text" in keys and not keys & {"label", "category", "intent"}:
        return "text"
    names = ", ".join(map(str, list(row)[:12]))
    raise RowRefusedError(
        f"no known format has the fields {names}; name yours, for instance "
        "data.columns: {prompt: YOUR_QUESTION, completion: YOUR_ANSWER}"
    )


def renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """The row with the person's columns under the format's names."""
    if not columns or not isinstance(row, Mapping):
        return row
    for own, theirs in columns.items():
        if theirs not in row:
            near = nearest(theirs, [str(k) for k in row])
            raise RowRefusedError(
                f"columns.{own}: no field {theirs!r}{near or '; it has ' + ', '.join(map(str, row))}"
            )
    kept = {k: v for k, v in row.items() if k not in columns.values() and k not in columns}
    return {**kept, **{own: row[theirs] for own, theirs in columns.items()}}


def as_conversation(row: Any, source: str, form: str) -> Conversation:
    """One row in a named format; RowRefusedError says what is wrong with it."""
    if isinstance(row, str) and form == "text":
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise RowRefusedError(f"a {type_name(row)}, not an object with named fields")
    _refuse_preferences(row)
    return FORMATS[form](row, source)


def _chat(row: Mapping[str, Any], source: str) -> Conversation:
    rows = _field(row, "messages", list)
    return Conversation(parsed_messages(rows, "messages"), source, "chat", parsed_tools(row))


def _sharegpt(row: Mapping[str, Any], source: str) -> Conversation:
    name = "conversations" if "conversations" in row else "conversation"
    turns = _field(row, name, list)
    messages = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append(Message("system", row["system"]))
    for i, turn in enumerate(turns):
        where = f"{name}[{i}]"
        if isinstance(turn, Mapping) and "role" in turn and "from" not in turn:
            messages.append(parsed_message(turn, where))
            continue
        if not isinstance(turn, Mapping) or "from" not in turn:
            raise RowRefusedError(f"{where}.from: missing; expected human or gpt")
        if turn["from"] not in list(_SHAREGPT_ROLES):
            near = nearest(turn["from"], list(_SHAREGPT_ROLES))
            raise RowRefusedError(
                f"{where}.from: {found_text(turn['from'])}{near or '; expected human, gpt'}"
            )
        role, value = _SHAREGPT_ROLES[turn["from"]], turn.get("value")
        if not isinstance(value, str):
            raise RowRefusedError(f"{where}.value: {found_text(value)}; expected text")
        train = parsed_train(turn, role, where)
        if turn["from"] == "function_call":
            calls = parsed_tool_calls(value, f"{where}.value")
            messages.append(Message(role, "", train, {"tool_calls": calls}))
        else:
            messages.append(Message(role, value, train))
    if not messages:
        raise RowRefusedError(f"{name}: an empty list; expected turns")
    return Conversation(tuple(messages), source, "chat", parsed_tools(row))


def _alpaca(row: Mapping[str, Any], source: str) -> Conversation:
    instruction, output = _field(row, "instruction", str), _field(row, "output", str)
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise RowRefusedError(f"input: {found_text(given)}; expected text")
    has_input = given and not given.isspace() and not _NO_INPUT.fullmatch(given)
    prompt = f"{instruction}\n{given}" if has_input else instruction
    messages = []
    if row.get("system"):
        messages.append(Message("system", _field(row, "system", str)))
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowRefusedError(f"history: {found_text(history)}; expected pairs of texts")
    for i, pair in enumerate(history):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(t, str) for t in pair)
        ):
            raise RowRefusedError(f"history[{i}]: {found_text(pair)}; expected [question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    messages += [Message("user", prompt), Message("assistant", output)]
    return Conversation(tuple(messages), source, "prompt")


def _prompt_completion(row: Mapping[str, Any], source: str) -> Conversation:
    pair = _pair(row)
    if pair is None:
        near = nearest("completion", [str(k) for k in row if k != "prompt"])
        has = ", ".join(map(str, list(row)[:12]))
        raise RowRefusedError(f"completion: no prompt and completion among {has}{near}")
    prompt, completion = row[pair[0]], row[pair[1]]
    if isinstance(prompt, list) or isinstance(completion, list):
        before, after = parsed_messages(prompt, pair[0]), parsed_messages(completion, pair[1])
        # The prompt of such a row is context, whoever spoke in it.
        context = tuple(Message(m.role, m.content, False, m.extra) for m in before)
        return Conversation(context + after, source, "chat", parsed_tools(row))
    for name, value in zip(pair, (prompt, completion), strict=True):
        if not isinstance(value, str):
            raise RowRefusedError(f"{name}: {found_text(value)}; expected text")
    system = (Message("system", _field(row, "system", str)),) if row.get("system") else ()
    turns = (*system, Message("user", prompt), Message("assistant", completion))
    return Conversation(turns, source, "prompt")


def _text(row: Mapping[str, Any], source: str) -> Conversation:
    return Conversation((Message("text", _field(row, "text", str)),), source, "text")


def _openassistant(row: Mapping[str, Any], source: str) -> Conversation:
    """The best-ranked path of a tree: at each message the reply of lowest rank, the first of equals."""
    node = row.get("prompt", row)
    messages: list[Message] = []
    while isinstance(node, Mapping):
        role = _SHAREGPT_ROLES.get(str(node.get("role")))
        text = node.get("text")
        if role is None or not isinstance(text, str):
            field = "role" if role is None else "text"
            raise RowRefusedError(
                f"{field}: {found_text(node.get(field))}; expected a message of a tree"
            )
        messages.append(Message(role, text))
        given = node.get("replies") or []
        if not isinstance(given, list):
            raise RowRefusedError(f"replies: {found_text(given)}; expected a list of messages")
        replies = [r for r in given if _is_live(r)]
        ranked = sorted(replies, key=lambda r: r["rank"] if r.get("rank") is not None else 1e9)
        node = ranked[0] if ranked else None
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise RowRefusedError("replies: nobody answers in this tree; leave it out")
    return Conversation(tuple(messages), source, "chat")


def _is_live(reply: Any) -> bool:
    return (
        isinstance(reply, Mapping)
        and not reply.get("deleted")
        and isinstance(reply.get("rank"), int | float | None)
    )


# People wrote `<noinput>`, `< NoInput >` and the like for no input.
_NO_INPUT = re.compile(r"\W*" + r"\W*".join(f"[{c}{c.upper()}]" for c in "noinput") + r"\W*")

FORMATS: dict[str, Callable[[Mapping[str, Any], str], Conversation]] = {
    "chat": _chat,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "openassistant": _openassistant,
    "prompt_completion": _prompt_completion,
    "text": _text,
}


def _pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), None)


def _refuse_preferences(row: Mapping[str, Any]) -> None:
    both = next((c for c in ("chosen", "chosen_messages", "chosen_response") if c in row), None)
    if both:
        raise RowRefusedError(
            f"{both}: rows of preferences (DPO); Pennyweight trains on one answer a row; keep the "
            "prompt and the chosen answer as prompt and completion"
        )
    if isinstance(row.get("label"), bool) and ("messages" in row or "completion" in row):
        raise RowRefusedError(
            "label: rows of judged answers (KTO); keep those that are true, without the label"
        )


def _field(row: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in row:
        near = nearest(name, [str(k) for k in row])
        raise RowRefusedError(
            f"{name}: missing{near or '; it has ' + ', '.join(map(str, list(row)[:12]))}"
        )
    if not isinstance(row[name], kind):
        wanted = "text" if kind is str else "a list"
        raise RowRefusedError(f"{name}: {found_text(row[name])}; expected {wanted}")
    return row[name]
