from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.data.formats import RowRefusedError, as_conversation, detect
from pennyweight.data.read import Faults, data_files, read_rows
from pennyweight.errors import DataError


def rows_of(path: Path) -> list[tuple[str, object]]:
    faults = Faults()
    rows = [(row.source, row.value) for row in read_rows(path, faults)]
    faults.raise_any()
    return rows


def faults_of(path: Path) -> str:
    faults = Faults()
    list(read_rows(path, faults))
    with pytest.raises(DataError) as caught:
        faults.raise_any()
    return str(caught.value)


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\u2028c"}')
    assert rows_of(path) == [("a.jsonl:1", {"text": "a"}), ("a.jsonl:3", {"text": "b\u2028c"})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": NaN}', "NaN is not JSON"),
        (b'{"text": "a", "text": "b"}', "text: the key stands twice"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at 13)"),
        (b'{"text": "a"', "column 13: not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "digit"),
    ],
)
def test_each_bad_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    message = faults_of(path)
    assert message.startswith("a.jsonl:2: ")
    assert said in message
    faults = Faults()
    assert [row.source for row in read_rows(path, faults)] == ["a.jsonl:1", "a.jsonl:3"]


def test_what_a_row_says_stays_on_one_line() -> None:
    faults = Faults()
    faults.add("a:1", 'role: "\x1b]0;owned\x07\n\u2028é"')
    with pytest.raises(DataError) as caught:
        faults.raise_any()
    assert str(caught.value) == r'a:1: role: "\x1b]0;owned\x07\n\u2028é"'


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("nonsense\n" * 1000)
    lines = faults_of(path).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "and 980 more"


def test_json_arrays_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n  {"text": "a"},\n  {"text":\n   "b"}, "c"\n]\n')
    assert rows_of(path) == [
        ("a.json:2", {"text": "a"}),
        ("a.json:3", {"text": "b"}),
        ("a.json:4", "c"),
    ]
    path.write_text("[]")
    assert rows_of(path) == []
    path.write_text('[{"text": "a"}, {"text": "b"')
    assert "a.json:1" in faults_of(path)
    path.write_text('{"data": [\n1]}')
    assert "one JSON object, not rows" in faults_of(path)


def test_json_lines_under_a_json_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [source for source, _ in rows_of(path)] == ["a.json:1", "a.json:2"]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfmr,ref\r\n"a\r\nb","c ""d"""\r\ne,f\r\n')
    assert rows_of(path) == [
        ("a.csv:3", {"mr": "a\r\nb", "ref": 'c "d"'}),
        ("a.csv:4", {"mr": "e", "ref": "f"}),
    ]
    path.write_text("mr,ref\na,b,c\n")
    assert faults_of(path).startswith("a.csv:2: 3 fields where the header names 2")
    path.write_text("mr,mr\na,b\n")
    assert "two columns" in faults_of(path)
    path.write_bytes(b"mr,ref\na,\xff\n")
    assert "not UTF-8" in faults_of(path)


def test_text_and_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert rows_of(path) == [("a.txt:1", {"text": "one\ntwo"}), ("a.txt:4", {"text": "three"})]
    path.write_text("one\ntwo\n")
    assert [source for source, _ in rows_of(path)] == ["a.txt:1", "a.txt:2"]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert rows_of(packed) == [("a.jsonl.gz:1", {"text": "a"})]
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-12])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        rows_of(packed)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    assert rows_of(path) == [("a.parquet:1", {"text": "a"}), ("a.parquet:2", {"text": "b"})]
    path.write_bytes(b"no")
    assert "not a readable Parquet" in faults_of(path)


def test_utf16_and_unknown_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(DataError, match=r"UTF-16.*iconv"):
        rows_of(path)
    with pytest.raises(DataError, match="cannot tell the format"):
        rows_of(tmp_path / "a.docx")


def test_folders(tmp_path: Path) -> None:
    for name in (
        "train-0.jsonl",
        "test.jsonl",
        "LICENSE.txt",
        ".hidden.jsonl",
        "sub/train-1.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = [path.name for path in data_files(tmp_path)]
    assert names == ["train-1.jsonl", "test.jsonl", "train-0.jsonl"]
    assert [path.name for path in data_files(tmp_path, "test")] == ["test.jsonl"]
    with pytest.raises(DataError, match="no file of rows for split 'dev'"):
        data_files(tmp_path, "dev")


GOOD = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "Hi", "weight": 0},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "tools": [{"name": "f", "parameters": {}}],
    }
).encode()


@settings(max_examples=500, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=3), st.integers(0, 5)),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_lines_never_raise_anything_else(
    edits: list[tuple[int, bytes, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    line = GOOD
    for at, new, cut in edits:
        line = line[:at] + new + line[at + cut :]
    path = tmp_path_factory.getbasetemp() / "mutated.jsonl"
    path.write_bytes(line)
    faults = Faults()
    try:
        for row in read_rows(path, faults):
            as_conversation(row.value, row.source, detect(row.value))
    except (RowRefusedError, DataError) as refused:
        assert str(refused)  # noqa: PT017 (most lines raise nothing)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "weight",
                    "messages",
                    "conversations",
                    "from",
                    "value",
                    "tools",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "instruction",
                    "input",
                    "output",
                    "history",
                    "system",
                    "prompt",
                    "completion",
                    "text",
                    "message_tree_id",
                    "replies",
                    "rank",
                    "parent_id",
                    "message_id",
                    "type",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(row=JSON, form=st.sampled_from(["chat", "alpaca", "sharegpt", "openassistant", "text"]))
def test_any_json_is_a_conversation_or_refused(row: object, form: str) -> None:
    for name in (form, "prompt_completion"):
        try:
            conversation = as_conversation(row, "a:1", name)
        except RowRefusedError as refused:
            assert str(refused)  # noqa: PT017 (some rows raise nothing)
        else:
            assert conversation.messages


def test_a_json_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pennyweight.data import read

    monkeypatch.setattr(read, "_CHUNK_BYTES", 7)
    path = tmp_path / "a.json"
    rows = [{"text": "é" * n, "n": 10**n} for n in range(12)]
    path.write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]")
    assert rows_of(path) == [(f"a.json:{n + 2}", row) for n, row in enumerate(rows)]
    path.write_text("[12345678901,\n 2.5e10, -3]\n")
    assert [row for _, row in rows_of(path)] == [12345678901, 2.5e10, -3]
    path.write_text('[{"a": 1},\n{"a": 1, "a": 2}]')
    assert faults_of(path).startswith("a.json:2: a: the key stands twice")
    path.write_bytes(b'[{"a": "\xff"}]')
    assert "not UTF-8" in faults_of(path)


def test_no_line_or_document_is_past_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pennyweight.data import read

    monkeypatch.setattr(read, "_LINE_LIMIT_BYTES", 2**20)
    for name, text in (
        ("a.csv", "a,b\n" + "," * 2**21),
        ("a.txt", "a\n\nb\n" + "word\n" * 2**18),
        ("a.jsonl", "a" * 2**21),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="1 MiB"):
            rows_of(tmp_path / name)


def test_parquet_that_is_not_what_it_says(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    bad = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), path)
    assert "a.parquet" in faults_of(path)
    parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"]], names=["t", "t"]), path)
    assert "two columns" in faults_of(path)


def test_messages_in_a_circle_are_not_lost(tmp_path: Path) -> None:
    from pennyweight.data.read import Row
    from pennyweight.data.trees import grown

    rows = [
        Row("a:1", {"message_id": "a", "parent_id": "b"}),
        Row("a:2", {"message_id": "b", "parent_id": "a"}),
        Row("a:3", {"message_id": ["x"], "parent_id": None}),
    ]
    faults = Faults()
    assert grown(rows, faults) == []
    assert faults.count == 3
    with pytest.raises(DataError, match="own forebear"):
        faults.raise_any()


def test_a_message_that_takes_anothers_id_is_not_its_own_reply() -> None:
    """A message that answers itself, and a root with its id: reading the tree never ended."""
    from pennyweight.data.read import Row
    from pennyweight.data.trees import grown

    own = {"message_id": "a", "parent_id": "a", "role": "prompter", "text": "x"}
    faults = Faults()
    rows = [Row("a:1", own), Row("a:2", {**own, "parent_id": None})]
    assert grown(rows, faults) == []
    assert faults.count == 2
    deep = [Row("b:0", {"message_id": "0", "parent_id": None})]
    deep += [Row(f"b:{n}", {"message_id": str(n), "parent_id": str(n - 1)}) for n in range(1, 5000)]
    faults = Faults()
    assert len(grown(deep, faults)) == 1
    assert faults.count == 0


def test_replies_are_a_list() -> None:
    row = {"role": "prompter", "text": "a", "replies": 5}
    with pytest.raises(RowRefusedError, match="replies: 5; expected a list"):
        as_conversation(row, "a:1", "openassistant")
