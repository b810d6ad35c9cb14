"""Rows as they were trained against every way in which they are asked, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np

from pennyweight.data.chat import Dropped, Renderer
from pennyweight.data.conversation import Conversation, Example
from pennyweight.data.specimens import SPECIAL_TEXT, Specimen, shape_of
from pennyweight.data.turns import trained_turns
from pennyweight.runs.parity.outcome import CHECKS, Check, Fault, Parity
from pennyweight.runs.parity.ways import Way, WayRefusedError

__all__ = ["TRAINING", "compared"]

TRAINING = "training"
_BEFORE, _AFTER = 4, 4

Read = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer as it was trained: the ids before it and its own, and which message it is.

    `cut`: `data.max_length` took its end away.
    """

    row: Conversation
    place: int
    prompt: list[int]
    ids: list[int]
    cut: bool


class _Table:
    """Checks made so far, and of each the first fault and the rows that fail it."""

    def __init__(self) -> None:
        self.held: dict[str, dict[Check, bool | None]] = {}
        self._faults: dict[tuple[str, Check], tuple[Fault, set[str]]] = {}

    def begin(self, way: str) -> None:
        self.held[way] = dict.fromkeys(CHECKS)

    def judge(self, way: str, check: Check, fault: Fault | None) -> None:
        before = self.held[way][check]
        self.held[way][check] = fault is None and before is not False
        if fault is not None:
            _, rows = self._faults.setdefault((way, check), (fault, set()))
            rows.add(fault.source)

    def failed(self, way: str, check: Check) -> set[str]:
        """Rows that fail it."""
        return self._faults[way, check][1] if (way, check) in self._faults else set()

    def faults(self) -> tuple[Fault, ...]:
        return tuple(replace(fault, rows=len(rows)) for fault, rows in self._faults.values())


def compared(
    specimens: Sequence[Specimen], renderer: Renderer, ways: Sequence[Way], *, mend: str
) -> Parity:
    """Hold each way against what was trained; `mend` is for training itself, where it drifted."""
    table, notes = _Table(), list[str]()
    table.begin(TRAINING)
    answers: list[_Answer] = []
    for specimen in specimens:
        source = specimen.conversation.source
        table.judge(TRAINING, "same ids", _drift(specimen, renderer, mend))
        for example in specimen.examples:
            ids = example.ids.tolist()
            table.judge(
                TRAINING, "one BOS", _beginning(TRAINING, specimen.conversation, ids, renderer)
            )
        of_row = list(_answers(specimen, renderer))
        table.judge(TRAINING, "stop token", _trained_stop(source, specimen, of_row, renderer))
        answers += of_row
        notes += (note for answer in of_row for note in _inner_stops(answer, renderer))
    for way in ways:
        table.begin(way.name)
        for answer in answers:
            _check(table, way, answer, renderer)
    rows = {
        s.conversation.source: shape_of(s.conversation, renderer.special_texts) for s in specimens
    }
    _judge_special(table, rows)
    for source, shape in rows.items():
        if SPECIAL_TEXT in shape:
            notes.append(f"{source}: its text holds a special token; every way reads it as one")
    return Parity(rows, len(answers), table.held, table.faults(), tuple(dict.fromkeys(notes)))


def _answers(specimen: Specimen, renderer: Renderer) -> Iterator[_Answer]:
    """Each trained answer of a row with the ids that stand before it."""
    row = specimen.conversation
    if row.kind == "text" or renderer.train_on == "all":
        return
    places = trained_turns(row.messages, renderer.train_on)
    spans = [
        (example, start, stop) for example in specimen.examples for start, stop in _spans(example)
    ]
    apart = [example.source.rpartition("#")[2] for example, _, _ in spans if "#" in example.source]
    if len(apart) == len(spans):  # each turn became an example of its own, named by its number
        places = [places[int(number) - 1] for number in apart]
    for place, (example, start, stop) in zip(places, spans, strict=False):
        ids = example.ids.tolist()
        cut = example.was_cut and stop == len(ids)
        yield _Answer(row, place, ids[:start], ids[start:stop], cut)


def _spans(example: Example) -> list[tuple[int, int]]:
    """Where trained tokens begin and end, `[start, stop)`."""
    edges = np.flatnonzero(np.diff([0, *example.trained.astype(np.int8), 0]))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _drift(specimen: Specimen, renderer: Renderer, mend: str) -> Fault | None:
    """The row is rendered now as it was trained."""
    source = specimen.conversation.source
    now = renderer.render(specimen.conversation)
    if isinstance(now, Dropped):
        what = f"it was trained, and now it is not: {now.reason}"
        return Fault(TRAINING, "same ids", source, what, mend)
    for before, after in zip_longest(specimen.examples, now):
        if before is None or after is None:
            what = f"it became {len(specimen.examples)} examples, and now {len(now)}"
            return Fault(TRAINING, "same ids", source, what, mend)
        fault = _difference(
            TRAINING, before.source, before.ids.tolist(), after.ids.tolist(),
            "it is not rendered as it was trained", mend, renderer.decode_all,
        )  # fmt: skip
        if fault is not None:
            return fault
        if not np.array_equal(before.trained, after.trained):
            what = "other tokens of it are trained than its rendering says"
            return Fault(TRAINING, "same ids", source, what, mend)
    return None


def _trained_stop(
    source: str, specimen: Specimen, answers: Sequence[_Answer], renderer: Renderer
) -> Fault | None:
    """Something is trained, and each answer that was not cut ends on a trained stop token."""
    stops = set(renderer.stop_ids)
    mend = "the model would never learn to stop; `pennyweight preview` shows what is trained"
    if not any(example.trained.any() for example in specimen.examples):
        return Fault(
            TRAINING, "stop token", source, "no token of it is trained", mend, in_data=True
        )
    for answer in answers:
        if not answer.cut and answer.ids[-1] not in stops:
            wanted = " or ".join(renderer.decode_all([stop]) for stop in sorted(stops))
            ends = renderer.decode_all(answer.ids[-3:])
            what = f"the stop token {wanted} is not trained: the trained part ends with {ends!r}"
            return Fault(TRAINING, "stop token", source, what, mend, in_data=True)
    return None


def _inner_stops(answer: _Answer, renderer: Renderer) -> Iterator[str]:
    inside = set(answer.ids[:-1]) & set(renderer.stop_ids)
    for stop in sorted(inside):
        said = renderer.decode_all([stop])
        yield f"{answer.row.source}: an answer holds {said} before its end; generation stops there"


def _check(table: _Table, way: Way, answer: _Answer, renderer: Renderer) -> None:
    source = answer.row.source
    try:
        asked = way.prompt(answer.row, answer.place)
    except WayRefusedError as refused:
        fault = Fault(way.name, "same ids", source, str(refused), way.mend)
        table.judge(way.name, "same ids", fault)
        return
    if asked is None:
        return
    found = list(asked)
    what = f"it is asked otherwise than message {answer.place + 1} was trained to answer"
    same = _difference(way.name, source, answer.prompt, found, what, way.mend, renderer.decode_all)
    if same is None and way.decode(answer.ids) != renderer.decode(answer.ids):
        what = f"the ids of the answer read {way.decode(answer.ids)[:60]!r} there, not as trained"
        same = Fault(way.name, "same ids", source, what, way.mend)
    table.judge(way.name, "same ids", same)
    table.judge(way.name, "one BOS", _beginning(way.name, answer.row, found, renderer, way.mend))
    table.judge(way.name, "stop token", _stopped(way, answer, renderer))


def _stopped(way: Way, answer: _Answer, renderer: Renderer) -> Fault | None:
    """Generation that way stops on the token that the answer was trained to end with."""
    if answer.cut or answer.ids[-1] in way.stop_ids:
        return None
    stops = ", ".join(renderer.decode_all([i]) for i in sorted(way.stop_ids)) or "nothing"
    what = (
        f"answers are trained to end with {renderer.decode_all(answer.ids[-1:])}, generation stops "
        f"on {stops}: it would not stop"
    )
    return Fault(way.name, "stop token", answer.row.source, what, way.mend)


def _beginning(
    way: str, row: Conversation, ids: Sequence[int], renderer: Renderer, mend: str | None = None
) -> Fault | None:
    """Exactly one BOS where the tokenizer wants one; never two."""
    bos = renderer.bos_id
    if bos is None:
        return None
    leading = next((n for n, i in enumerate(ids) if i != bos), len(ids))
    if leading == 1 or (leading == 0 and not renderer.adds_bos(row.kind)):
        return None
    text = renderer.decode_all([bos])
    in_data = any(message.content.lstrip().startswith(text) for message in row.messages)
    what = f"it begins with {leading} BOS tokens ({text}), where one belongs"
    if mend is None:
        mend = (
            f"the row's own text begins with {text}: remove it from the data"
            if in_data
            else f"data.template prints {text} more than once: remove one"
        )
    told = _around(list(ids), leading, renderer.decode_all)
    return Fault(way, "one BOS", row.source, what, mend, 1, leading, (), told, in_data)


def _judge_special(table: _Table, rows: Mapping[str, tuple[str, ...]]) -> None:
    """Rows whose text holds a special token: whether each way that asks them agrees."""
    if not any(SPECIAL_TEXT in shape for shape in rows.values()):
        return
    for way, held in table.held.items():
        if held["same ids"] is not None:
            failed = table.failed(way, "same ids")
            held["special text"] = not any(SPECIAL_TEXT in rows[source] for source in failed)


def _difference(
    way: str,
    source: str,
    trained: list[int],
    found: list[int],
    what: str,
    mend: str,
    read: Read,
) -> Fault | None:
    pairs = enumerate(zip_longest(trained, found))
    at = next((i for i, (a, b) in pairs if a != b), None)
    if at is None:
        return None
    return Fault(
        way,
        "same ids",
        source.split("#")[0],
        f"{what}; the first difference is token {at}",
        mend,
        position=at,
        trained=_around(trained, at, read),
        found=_around(found, at, read),
    )


def _around(ids: list[int], at: int, read: Read) -> tuple[str, ...]:
    """The tokens around a place, the one there in brackets."""
    shown = []
    for place in range(max(0, at - _BEFORE), at + _AFTER + 1):
        text = repr(read([ids[place]])) if place < len(ids) else "(end)"
        shown.append(f"[{text}]" if place == at else text)
        if place >= len(ids):
            break
    return ("…", *shown) if at > _BEFORE else tuple(shown)
