"""OpenAssistant's other form: one message a line, each naming its parent; grown back into trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pennyweight.data.read import Faults, Row

__all__ = ["grown"]


def grown(rows: Sequence[Row], faults: Faults) -> list[Row]:
    """One row for each root, with `replies` filled in.

    Faults: an id that is missing or used twice, a parent that is not there, and messages that are
    their own forebears, which no root would ever reach.
    """
    nodes: dict[str, dict[str, Any]] = {}
    kept: list[tuple[Row, str]] = []
    for row in rows:
        identity = row.value.get("message_id")
        if not isinstance(identity, str) or identity in nodes:
            faults.add(row.source, "message_id: missing or used twice; give each message its own")
            continue
        nodes[identity] = {**row.value, "replies": []}
        kept.append((row, identity))
    roots = []
    for row, identity in kept:
        parent = row.value.get("parent_id")
        if parent is None:
            roots.append(Row(row.source, nodes[identity]))
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(nodes[identity])
        else:
            faults.add(row.source, f"parent_id: no message {str(parent)[:40]!r} in the data")
    lost = _in_circles(nodes)
    for row, identity in kept:
        if identity in lost:
            faults.add(row.source, "parent_id: the message is its own forebear; name its true one")
    return roots


def _in_circles(nodes: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The messages whose way up never ends; each is walked over once."""
    ends: dict[str, bool] = {}
    for start in nodes:
        way: dict[str, None] = {}
        at: Any = start
        while isinstance(at, str) and at in nodes and at not in ends and at not in way:
            way[at] = None
            at = nodes[at].get("parent_id")
        endless = isinstance(at, str) and (at in way or not ends.get(at, True))
        ends |= dict.fromkeys(way, not endless)
    return {identity for identity, comes_to_an_end in ends.items() if not comes_to_an_end}
