from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pennyweight.config import DataConfig, Source
from pennyweight.data import prepare as room
from pennyweight.data.conversation import Conversation, Message
from pennyweight.data.dataset import weighted
from pennyweight.data.hub import chosen_files
from pennyweight.data.prepare import Prepared, prepare
from pennyweight.data.preview import named_rows, preview
from pennyweight.data.spool import Spool
from pennyweight.errors import DataError

Run = Callable[..., Prepared]


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer: Any) -> Run:
    def made(seed: int = 0, **settings: Any) -> Prepared:
        config = DataConfig(**settings)
        return prepare(config, tiny_tokenizer, seed=seed, cache_dir=tmp_path / "cache")

    return made


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)]


def test_a_file_becomes_examples_with_a_ledger(run: Run, tmp_path: Path) -> None:
    rows = [
        *pairs(40),
        {"prompt": "x", "completion": " "},
        {"prompt": "y", "completion": "z" * 200},
    ]
    file = write(tmp_path / "my.jsonl", rows)
    prepared = run(train=file, max_length=100, eval_fraction=0.1)
    assert len(prepared.train) + len(prepared.eval) == 41
    by_source = {row.source: row for row in prepared.ledger.rows}
    assert len(by_source) == 42
    assert by_source["my.jsonl:41"].dropped == "the answer is empty"
    assert by_source["my.jsonl:42"].cut == by_source["my.jsonl:42"].tokens - 100
    summary = prepared.ledger.summary()
    assert summary["trained_tokens"] == prepared.train.trained_tokens
    assert summary["tokens"] == int(prepared.train.lengths.sum())
    assert "format prompt_completion (found)" in "\n".join(prepared.ledger.lines())
    prepared.ledger.write(tmp_path / "ledger.jsonl")
    first = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[0])
    assert set(first) >= {"source", "tokens", "trained_tokens", "cut", "dropped"}


def test_the_cache_gives_the_same_and_notices_every_change(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", pairs(30))
    first, again = run(train=file), run(train=file)
    assert first.fingerprint == again.fingerprint
    assert isinstance(again.train[0].ids.base.base, np.memmap)
    for a, b in ((first.train, again.train), (first.eval, again.eval)):
        assert [e.ids.tolist() for e in a] == [e.ids.tolist() for e in b]
        assert [e.trained.tolist() for e in a] == [e.trained.tolist() for e in b]
        assert [e.source for e in a] == [e.source for e in b]
    assert first.ledger == again.ledger
    assert first.questions == again.questions
    others = [
        run(train=file, max_length=100),
        run(train=file, train_on="all"),
        run(train=file, template="plain"),
        run(seed=1, train=file),
    ]
    write(tmp_path / "my.jsonl", pairs(31))
    others.append(run(train=file))
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_a_damaged_cache_is_not_used(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", pairs(30))
    first = run(train=file)
    ids = first.train[0].ids.tolist()
    (array,) = (tmp_path / "cache").rglob("train.ids.npy")
    content = bytearray(array.read_bytes())
    content[-3] ^= 1
    array.write_bytes(content)
    assert run(train=file).train[0].ids.tolist() == ids
    assert array.read_bytes() != bytes(content), "the damaged one has made place"
    assert not list((tmp_path / "cache").rglob(".unfinished*"))


def test_held_out_rows_are_stable_and_leak_nothing(run: Run, tmp_path: Path) -> None:
    rows = pairs(200)
    rows += [{"prompt": f"question {i}", "completion": "another"} for i in range(200)]
    file = write(tmp_path / "my.jsonl", rows)
    prepared = run(train=file, eval_fraction=0.1)

    def asked(part: str) -> set[str]:
        return {rows[int(r.source.split(":")[1]) - 1]["prompt"] for r in prepared.ledger.part(part)}

    assert not asked("train") & asked("eval")
    assert 10 <= len(prepared.eval) <= 80
    assert len(prepared.questions) == len(prepared.eval)
    # New rows leave the old ones where they were.
    held = asked("eval")
    rows += [{"prompt": f"new {i}", "completion": "a"} for i in range(50)]
    write(tmp_path / "my.jsonl", rows)
    prepared = run(train=file, eval_fraction=0.1)
    assert held <= asked("eval")


def test_a_split_seed_holds_the_same_rows_out_whatever_the_seed(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", pairs(200))
    one, other = (run(train=file, split_seed=5, seed=seed) for seed in (0, 1))
    assert one.fingerprint == other.fingerprint == run(train=file, seed=5).fingerprint
    assert one.eval.sources == other.eval.sources
    assert run(train=file, seed=0).eval.sources != run(train=file, seed=1).eval.sources


def test_one_question_for_all_rows_is_split_by_row(run: Run, tmp_path: Path) -> None:
    rows = [{"prompt": "Tell a story.", "completion": f"story {i}"} for i in range(100)]
    file = write(tmp_path / "my.jsonl", rows * 2)
    prepared = run(train=file, eval_fraction=0.1, max_duplicate_share=0.5)
    assert "no row is on both sides" in " ".join(prepared.ledger.notes)
    assert 0 < len(prepared.eval) < 60
    seen = [{e.ids.tobytes() for e in part} for part in (prepared.train, prepared.eval)]
    assert not seen[0] & seen[1]


def test_questions_are_prompts_as_served(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", pairs(10))
    dev = write(tmp_path / "dev.jsonl", pairs(3))
    prepared = run(train=file, eval=dev, max_leaked_share=1)
    assert prepared.references == ["answer 0", "answer 1", "answer 2"]
    example, question = prepared.eval[0], prepared.questions[0]
    start = int(np.flatnonzero(example.trained)[0])
    assert question.prompt_ids == tuple(example.ids[:start].tolist())
    assert "warning: 3 of 3 eval rows are also trained on" in prepared.ledger.notes


def test_sources_mix_by_weight(run: Run, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", pairs(10))
    two = write(tmp_path / "two.jsonl", pairs(10))
    sources = [Source(path=one, weight=0.5), Source(path=two, weight=2.3)]
    prepared = run(train=sources, eval_fraction=0, max_duplicate_share=1)
    names = [source.split(":")[0] for source in prepared.train.sources]
    assert (names.count("one.jsonl"), names.count("two.jsonl")) == (5, 23)
    times = weighted(10, 2.3, seed=0, name="a").tolist()
    assert times == weighted(10, 2.3, seed=0, name="a").tolist()
    assert (sum(times), set(times)) == (23, {2, 3})
    assert (
        weighted(10, 0.5, seed=0, name="a").tolist() != weighted(10, 0.5, seed=1, name="a").tolist()
    )
    assert weighted(3, 1.0, seed=0, name="a").tolist() == [1, 1, 1]


def test_faults_of_all_files_come_at_once(run: Run, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"messages": [{"role": "assitant", "content": "a"}]}\n')
    two = tmp_path / "two.jsonl"
    two.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\n')
    with pytest.raises(DataError) as caught:
        run(train=[str(one), str(two)])
    assert str(caught.value).split("\n") == [
        'one.jsonl:1: messages[0].role: "assitant"; did you mean "assistant"?',
        "two.jsonl:2: prompt: 3; expected text",
    ]


def test_files_of_one_name_are_told_apart(run: Run, tmp_path: Path) -> None:
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(write(tmp_path / folder / "my.jsonl", pairs(2)))
    prepared = run(train=files, eval_fraction=0, max_duplicate_share=1)
    called = [f"{name}:{line}" for name in ("a/my.jsonl", "b/my.jsonl") for line in (1, 2)]
    assert prepared.train.sources == called


def test_rows_to_hold_out_may_have_the_name_of_those_to_train(run: Run, tmp_path: Path) -> None:
    """As uploads do. Specimens and questions go by `file:line`, and each is its own file's."""
    deep = tmp_path / "b" / "a"
    deep.mkdir(parents=True)
    train = write(tmp_path / "my.jsonl", pairs(4))
    held = write(deep / "my.jsonl", [{"prompt": "held out", "completion": "the answer"}] * 2)
    prepared = run(train=train, eval=held, max_duplicate_share=1)
    assert prepared.train.sources[0] == f"{tmp_path.name}/my.jsonl:1"
    assert prepared.eval.sources == ["a/my.jsonl:1", "a/my.jsonl:2"]
    for specimen in prepared.specimens:
        (example,) = specimen.examples
        assert ("held out" in specimen.conversation.messages[0].content) == (
            example.source in prepared.eval.sources
        )
    # One file for both is called by its name.
    assert run(train=train, eval=train, max_leaked_share=1).eval.sources[0] == "my.jsonl:1"


def test_data_that_trains_nothing_is_refused(run: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(DataError, match=r"none of 3 rows.*\n  3 rows: the answer is empty"):
        run(train=file, eval_fraction=0)
    with pytest.raises(
        DataError, match=r"max_cut_share: 5 of 5 rows .* longer than data.max_length 20"
    ):
        run(
            train=write(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "b" * 99}] * 5),
            max_length=20,
            eval_fraction=0,
        )
    with pytest.raises(DataError, match="no rows"):
        run(train=write(tmp_path / "empty.jsonl", []))


def test_names_that_are_nowhere(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "my.jsonl", pairs(1))
    with pytest.raises(DataError, match=r'no such file.*did you mean "my.jsonl"'):
        run(train=str(tmp_path / "my.json"))


def test_an_unwritable_cache_is_said_not_fatal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "put", full)
    prepared = run(train=write(tmp_path / "my.jsonl", pairs(5)))
    assert "No space left" in prepared.ledger.notes[-1]
    assert len(prepared.train) + len(prepared.eval) == 5
    assert not list((tmp_path / "cache" / "data").iterdir())


def test_a_value_of_parquet_that_json_lacks_comes_through(tmp_path: Path) -> None:
    """A spool of rows gives back what it was given, plain or not, forwards and by place."""
    dated = {"type": "function", "function": {"name": "f", "since": date(2026, 1, 31)}}
    rows = [
        Conversation(
            (Message("user", f"q{i} ☂"), Message("assistant", "a", True, {"x": [i]})), f"r:{i}"
        )
        for i in range(40)
    ]
    rows[7] = replace(rows[7], tools=(dated,))
    with closing(Spool(tmp_path)) as spool:
        for row in rows:
            spool.append(row)
        assert list(spool) == rows
        assert (spool[7], spool[-1]) == (rows[7], rows[39])
        assert list(spool.view(np.array([9, 7]))[1:]) == [rows[7]]
    assert not list(tmp_path.iterdir())


def test_rows_alike_are_told_whatever_lies_between(run: Run, tmp_path: Path) -> None:
    rows = [*pairs(5), {"prompt": "x", "completion": " "}, *pairs(3), *pairs(1)]
    prepared = run(train=write(tmp_path / "my.jsonl", rows), eval_fraction=0, max_duplicate_share=1)
    found = [(row.source.partition(":")[2], row.same_as) for row in prepared.ledger.rows.repeated]
    assert found == [(str(i), f"my.jsonl:{j}") for i, j in ((7, 1), (8, 2), (9, 3), (10, 1))]


def test_hub_files_of_a_split() -> None:
    files = ["README.md", "data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet"]
    assert chosen_files(files, "train") == ["data/train-0.parquet", "data/train-1.parquet"]
    assert chosen_files(files, "test") == ["data/test-0.parquet"]
    assert chosen_files(["alpaca.json", "eval.json"], "train") == ["alpaca.json"]
    assert chosen_files(files, "validation") == []


def test_builtin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(split: str) -> list[dict[str, Any]]:
        answer = {"role": "assistant", "content": "{}"}
        asked = [{"role": "user", "content": f"{split} {i}"} for i in range(3)]
        return [
            {"messages": [ask, answer], "source": f"{split}.py:{i}"} for i, ask in enumerate(asked)
        ]

    monkeypatch.setattr("pennyweight.builtin.task.rows", rows)
    prepared = run(train="builtin")
    assert prepared.train.sources == [f"builtin/train.py:{i}" for i in range(3)]
    assert [question.source for question in prepared.questions] == [
        f"builtin/eval.py:{i}" for i in range(3)
    ]


def test_preview_marks_what_is_trained(run: Run, tmp_path: Path) -> None:
    rows = [{"prompt": "Käse ☂?", "completion": "Ja ☂!"}] * 2
    prepared = run(train=write(tmp_path / "my.jsonl", rows), eval_fraction=0)
    shown = preview(prepared, rows=5)
    assert len(shown) == 2
    assert [segment.trained for segment in shown[0].segments] == [False, True]
    assert shown[0].segments[1].text.startswith("Ja ☂!")
    assert shown[0].tokens == len(prepared.train[0].ids)


def test_any_row_can_be_looked_at(run: Run, tmp_path: Path) -> None:
    rows = [
        *pairs(40),
        {"prompt": "x", "completion": " "},
        {"prompt": "y", "completion": "long " * 50},
    ]
    held = [{"prompt": "z", "completion": "held"}]
    settings: dict[str, Any] = {
        "train": write(tmp_path / "my.jsonl", rows),
        "eval": write(tmp_path / "dev.jsonl", held),
        "max_length": 60,
    }
    prepared, config = run(**settings), DataConfig(**settings)
    fifth, empty, cut = named_rows(prepared, config, ["my.jsonl:5", "41", "42"])
    assert [s.text for s in fifth.segments if s.trained] == ["answer 4<|im_end|>"]
    assert (fifth.part, fifth.dropped, fifth.tokens) == ("train", None, fifth.length_before_cut)
    assert empty.dropped == "the answer is empty"
    assert "user: x" in empty.segments[0].text
    assert cut.tokens == 60 < cut.length_before_cut
    kept, lost = ["".join(s.text for s in cut.segments if s.cut is gone) for gone in (False, True)]
    assert (kept + lost).endswith("long " * 50 + "<|im_end|>")
    assert "y" in kept
    assert cut.segments[-1].trained
    assert cut.segments[-1].cut
    assert cut.trained_tokens < sum(len(s.text) for s in cut.segments if s.trained)
    # Line 1 of each of the two files.
    assert [row.part for row in named_rows(prepared, config, ["1"])] == ["train", "eval"]
    with pytest.raises(DataError, match=r'my.jsonl:99: no such row.*did you mean "my.jsonl:9"'):
        named_rows(prepared, config, ["my.jsonl:99"])


def test_a_row_too_long_is_shown_whole(run: Run, tmp_path: Path) -> None:
    rows = [*pairs(20), {"prompt": "y", "completion": "long " * 50}]
    settings: dict[str, Any] = {
        "train": write(tmp_path / "my.jsonl", rows),
        "eval_fraction": 0,
        "max_length": 60,
        "overlong": "drop",
    }
    (shown,) = named_rows(run(**settings), DataConfig(**settings), ["21"])
    assert "over data.max_length 60" in (shown.dropped or "")
    assert (shown.tokens, shown.trained_tokens) == (0, 0)
    assert "".join(s.text for s in shown.segments).endswith("long <|im_end|>")


def test_e2e_from_its_csv(shared_data: Path, stories_tokenizer: Any, tmp_path: Path) -> None:
    folder = shared_data / "sft" / "e2e-nlg"
    config = DataConfig(
        train=str(folder / "devset.csv"),
        eval_fraction=0,
        columns={"prompt": "mr", "completion": "ref"},
        prompt_suffix="\n",
        max_length=512,
    )
    prepared = prepare(config, stories_tokenizer, seed=0, stop_id=1, cache_dir=tmp_path)
    assert len(prepared.train) == 4672
    assert prepared.renderer.decode(prepared.train[0].ids) == (
        "name[Alimentum], area[city centre], familyFriendly[no]\n"
        "There is a place in the city centre, Alimentum, that is not family-friendly."
    )


def test_duplicates_of_alpaca_land_on_one_side(
    shared_data: Path, stories_tokenizer: Any, tmp_path: Path
) -> None:
    file = shared_data / "sft/formats/alpaca_en_demo.json"
    config = DataConfig(train=str(file), max_length=2048)
    prepared = prepare(config, stories_tokenizer, seed=3, cache_dir=tmp_path)
    seen = [{e.ids.tobytes() for e in part} for part in (prepared.train, prepared.eval)]
    assert not seen[0] & seen[1]
    texts = "\n".join(prepared.renderer.decode(example.ids) for example in prepared.train)
    assert "<noinput>" not in texts
