"""YAML means what it looks like, and nothing is read silently."""

import math

import pytest

from pennyweight.config.document import read_document, spell


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e-3", -2.5e-3),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ('"1e-5"', "1e-5"),
        ("'8'", "8"),
        ("!!str 8", "8"),
        ("-.inf", -math.inf),
        ("[q_proj, 8]", ["q_proj", 8]),
        ("=", "="),
    ],
)
def test_a_word_means_what_it_looks_like(written: str, meant: object) -> None:
    document = read_document(f"key: {written}")
    assert document.faults == []
    assert document.tree == {"key": meant}
    assert type(document.tree["key"]) is type(meant)


def test_every_value_knows_its_line() -> None:
    document = read_document("a: 1\nb:\n  c:\n    - x\n    - {d: 2}\n")
    lines = {spell(path): line for path, line in document.lines.items() if path}
    assert lines == {"a": 1, "b": 2, "b.c": 3, "b.c[0]": 4, "b.c[1]": 5, "b.c[1].d": 5}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: 2\na: 3", 3, "a is given twice, first on line 1"),
        ("x:\n  a: 1\n  a: 1", 3, "x.a is given twice, first on line 2"),
        ("a: &x [*x]", 1, "contains itself"),
        ("a: !!python/object:os.system {}", 1, "tag"),
        ("a: !!int '5'", 1, "tag"),
        ("a: &x {b: 1}\nc:\n  <<: *x", 3, "merge keys"),
        ("? [a]\n: 1", 1, "a key must be a word"),
        ("a: 1\n---\nb: 2", 2, "not YAML"),
        ("a: [1, 2", 1, "not YAML"),
        ("a: 1\n\tb: 2", 2, "not YAML"),
        ("a: *nobody", 1, "not YAML"),
        ("a: \0", 1, "not YAML"),
        ('a: "\\UFFFFFFFF"', 1, "not YAML"),
        ("[" * 1000, 1, "deep"),
        ("[" * 60 + "]" * 60, 1, "deep"),
        ("a: " + "x" * 1_000_001, 1, "too many"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text: str, line: int, said: str) -> None:
    faults = read_document(text).faults
    assert any(found >= line and said in message for found, message in faults), faults


def test_anchors_are_followed_but_not_into_billions() -> None:
    assert read_document("a: &x [1, 2]\nb: *x").tree == {"a": [1, 2], "b": [1, 2]}
    laughs = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (fault,) = read_document("\n".join(laughs)).faults
    assert "once anchors are followed" in fault[1]
