"""A parsed template with its loops, slices and literals counted, before it is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import nodes

from pennyweight.data.sandbox.meter import TemplateRefusedError

__all__ = ["with_meters"]

NODES_LIMIT = 10_000  # the largest template known to us has 1,400; Python compiles these in 0.4 s


def with_meters(tree: nodes.Template) -> nodes.Template:
    """Count the steps of every loop, and the size of every `~`, slice, list, tuple and dict."""
    waiting: list[nodes.Node] = [tree]
    seen = 0
    while waiting:
        seen += 1
        waiting += waiting.pop().iter_child_nodes()
        if seen > NODES_LIMIT:
            raise TemplateRefusedError(f"more than {NODES_LIMIT:,} parts; no chat needs so many")
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(loop.iter, "_metered")
    _count_built(tree)
    return tree


def _count_built(node: nodes.Node) -> None:
    for field, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for number, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _count_built(child)
            if (counted := _counted(child)) is not child:
                if isinstance(value, list):
                    value[number] = counted
                else:
                    setattr(node, field, counted)


def _counted(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        return _filtered(node.nodes[0], "_joined", node.nodes[1:])
    is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    builds = isinstance(node, nodes.List | nodes.Dict) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    )
    return _filtered(node, "_bounded") if is_slice or builds else node


def _filtered(node: Any, name: str, arguments: Sequence[nodes.Expr] = ()) -> nodes.Node:
    return nodes.Filter(node, name, list(arguments), [], None, None).set_lineno(node.lineno)
