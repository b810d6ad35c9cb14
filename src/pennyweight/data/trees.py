"""OpenAssistant's other form: one message a line, each naming its parent; grown back into trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pennyweight.data.read import Faults, Row

__all__ = ["grown"]


def grown(rows: Sequence[Row], faults: Faults) -> list[Row]:
    """One row for each root, with `replies` filled in; a parent that is not there is a fault."""
    nodes: dict[Any, dict[str, Any]] = {}
    for row in rows:
        identity = row.value.get("message_id")
        if not isinstance(identity, str) or identity in nodes:
            faults.add(row.source, "message_id: missing or used twice; give each message its own")
            continue
        nodes[identity] = {**row.value, "replies": []}
    roots = []
    for row in rows:
        node, parent = nodes.get(row.value.get("message_id")), row.value.get("parent_id")
        if node is None:
            continue
        if parent is None:
            roots.append(Row(row.source, node))
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            faults.add(row.source, f"parent_id: no message {str(parent)[:40]!r} in the data")
    return roots
