from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pennyweight.data.conversation import Conversation
from pennyweight.data.formats import RowRefusedError, as_conversation, detect, renamed
from pennyweight.data.read import Faults, Row, read_rows
from pennyweight.data.trees import grown


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def test_openai_rows_with_tools_and_weights() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "What's "}, {"type": "text", "text": "up?"}],
            },
            {
                "role": "assistant",
                "content": None,
                "weight": 0,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            {"role": "assistant", "content": "Two.", "weight": 1, "refusal": None},
        ],
        "tools": [{"name": "f", "parameters": {}}],
    }
    assert detect(row) == "chat"
    conversation = as_conversation(row, "a.jsonl:1", "chat")
    _system, user, call, tool, answer = conversation.messages
    assert user.content == "What's up?"
    assert (call.train, answer.train, user.train) == (False, True, None)
    assert call.extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert tool.extra == {"tool_call_id": "1"}
    assert conversation.tools == (
        {"type": "function", "function": {"name": "f", "parameters": {}}},
    )


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "assitant", "content": "a"}, 'role: "assitant"; did you mean "assistant"?'),
        ({"rol": "user", "content": "a"}, 'role: missing; did you mean "rol"?'),
        ({"role": "user", "contents": "a"}, 'content: missing; did you mean "contents"?'),
        ({"role": "user", "content": 3}, "content: 3; expected text"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            'content[0]: "image_url"; only text',
        ),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight: 0.5; expected 0 or 1"),
        ({"role": "user", "content": "a", "weight": 1}, "weight: 1 on a user message"),
        ("hello", 'messages[0]: "hello"; expected an object'),
    ],
)
def test_faults_name_the_field_and_the_mend(message: Any, what: str) -> None:
    with pytest.raises(RowRefusedError) as caught:
        as_conversation({"messages": [message]}, "a:1", "chat")
    assert what in str(caught.value)
    assert str(caught.value).startswith("messages[0]")


def test_alpaca() -> None:
    row = {
        "instruction": "Add.",
        "input": "1 and 2",
        "output": "3",
        "history": [["a", "b"]],
        "system": "s",
    }
    assert detect(row) == "alpaca"
    assert said(as_conversation(row, "a:1", "alpaca")) == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add.\n1 and 2"),
        ("assistant", "3"),
    ]
    for empty in ("", "<noinput>", None):
        row = {"instruction": "Add.", "input": empty, "output": "3"}
        assert said(as_conversation(row, "a:1", "alpaca"))[0] == ("user", "Add.")


def test_sharegpt_with_calls() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two"},
        ],
        "tools": '[{"name": "f"}]',
    }
    conversation = as_conversation(row, "a:1", detect(row))
    assert [m.role for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].extra["tool_calls"][0]["function"]["name"] == "f"
    with pytest.raises(RowRefusedError, match='from: "humn"; did you mean "human"'):
        as_conversation({"conversations": [{"from": "humn", "value": ""}]}, "a:1", "sharegpt")


def test_openassistant_takes_the_best_ranked_path() -> None:
    def node(role: str, text: str, *replies: Any, rank: int | None = None) -> dict[str, Any]:
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    tree = node(
        "prompter",
        "q",
        node("assistant", "second", rank=1),
        node("assistant", "first", node("prompter", "unanswered"), rank=0),
    )
    row = {"message_tree_id": "x", "prompt": tree}
    assert said(as_conversation(row, "a:1", detect(row))) == [("user", "q"), ("assistant", "first")]
    with pytest.raises(RowRefusedError, match="nobody answers"):
        as_conversation(
            {"message_tree_id": "x", "prompt": node("prompter", "q")}, "a:1", "openassistant"
        )


def test_flat_messages_grow_into_trees() -> None:
    flat = [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q"},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "a", "rank": 0},
        {"message_id": "3", "parent_id": "?", "role": "assistant", "text": "b"},
    ]
    faults = Faults()
    (root,) = grown([Row(f"a:{i}", row) for i, row in enumerate(flat, 1)], faults)
    assert said(as_conversation(root.value, root.source, "openassistant")) == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    assert faults.count == 1


def test_prompts_text_and_columns() -> None:
    for row in ({"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}):
        conversation = as_conversation(row, "a:1", detect(row))
        assert (said(conversation), conversation.kind) == (
            [("user", "a"), ("assistant", "b")],
            "prompt",
        )
    row = renamed({"mr": "a", "ref": "b"}, {"prompt": "mr", "completion": "ref"})
    assert detect(row) == "prompt_completion"
    with pytest.raises(
        RowRefusedError, match=r"columns.prompt: no field 'mrr'; did you mean \"mr\""
    ):
        renamed({"mr": "a"}, {"prompt": "mrr"})
    with pytest.raises(
        RowRefusedError, match=r"no known format has the fields mr, ref.*data\.columns"
    ):
        detect({"mr": "a", "ref": "b"})
    lists = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    assert said(as_conversation(lists, "a:1", detect(lists))) == [("user", "a"), ("assistant", "b")]
    assert detect({"text": "a"}) == detect("a") == "text"


def test_preferences_are_refused_with_the_mend() -> None:
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"messages": [], "label": True}):
        with pytest.raises(RowRefusedError, match="keep"):
            detect(row)


REAL = {
    "formats/alpaca_en_demo.json": ("alpaca", 999),
    "formats/alpaca_zh_demo.json": ("alpaca", 1000),
    "formats/glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "formats/identity.json": ("alpaca", 91),
    "formats/reason_tool_use_demo_50.jsonl": ("chat", 50),
    "formats/v1_sft_demo.jsonl": ("chat", 500),
    "formats/c4_demo.jsonl": ("text", 300),
    "formats/wiki_demo.txt": ("text", 30),
    "chat-formats/en_100_message.jsonl": ("openassistant", 100),
    "chat-formats/en_100_tree.jsonl": ("openassistant", 100),
    "chat-formats/sharegpt_dummy_conversation.json": ("sharegpt", 500),
    "chat-formats/wwdc25_prompt_completion_valid.jsonl": ("prompt_completion", 144),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets_are_recognised_and_read_whole(name: str, shared_data: Path) -> None:
    faults = Faults()
    rows = list(read_rows(shared_data / "sft" / name, faults))
    form, count = REAL[name]
    assert detect(rows[0].value) == form
    assert len([as_conversation(row.value, row.source, form) for row in rows]) == count
    faults.raise_any()


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "kto_en_demo.json", "v1_dpo_demo.jsonl"])
def test_real_preference_sets_are_refused(name: str, shared_data: Path) -> None:
    rows = list(read_rows(shared_data / "sft" / "formats" / name, Faults()))
    with pytest.raises(RowRefusedError, match=r"DPO|KTO"):
        detect(rows[0].value)
