"""The verbs of the registry: `pennyweight adapters ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pennyweight.cli import show

if TYPE_CHECKING:
    from pennyweight.registry import Registry, Version

__all__ = ["adapters"]

adapters = typer.Typer(
    name="adapters",
    help="Keep adapters: versions, names, tags, lineage; push and pull.",
    rich_markup_mode=None,
)

Folder = Annotated[
    Path | None,
    typer.Option(
        "--registry", help="Its folder; default $PENNYWEIGHT_REGISTRY or your data folder."
    ),
]
Reference = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="NAME, NAME@TAG, NAME@VERSION or VERSION.")
]
Name = Annotated[str, typer.Option(help="What it is called here.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="Point this tag at it; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


@adapters.command("list")
def list_(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Versions of this name.")] = "",
    registry: Folder = None,
    as_json: Json = False,
) -> None:
    """List the adapters that are kept; with a name, all of its versions."""
    with show.Printer(as_json) as printer:
        kept = _registry(registry)
        entries = kept.entries(name or None)
        rows = [
            {
                "name": entry.name,
                "version": entry.version.hash,
                "tags": list(entry.tags),
                "added_at": entry.added_at,
                **_figures(entry.version),
                "base": entry.version.base.get("name"),
                "r": entry.version.trained.get("r"),
            }
            for entry in entries
            if name or "latest" in entry.tags
        ]
        answer = {"registry": str(kept.folder), "adapters": rows}
        printer.give(answer, lambda: _listed(rows) if rows else f"none kept in {kept.folder} yet")


@adapters.command()
def add(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's, or a PEFT adapter's.")],
    name: Name,
    tag: Tags = None,
    parent: Annotated[
        str | None, typer.Option(help="The kept adapter that it was trained on from.")
    ] = None,
    merged_from: Annotated[
        list[str] | None, typer.Option(help="A kept adapter it was merged from; repeatable.")
    ] = None,
    registry: Folder = None,
    as_json: Json = False,
) -> None:
    """Keep the adapter of a run, or of any folder in PEFT's layout."""
    with show.Printer(as_json) as printer:
        kept = _registry(registry)
        version = kept.add(
            source, name=name, tags=tag or (), parent=parent, merged_from=merged_from or ()
        )
        _give(printer, kept, version)


@adapters.command("show")
def show_(reference: Reference, registry: Folder = None, as_json: Json = False) -> None:
    """Say what an adapter is, what it was worth, and which tools load it as it is."""
    with show.Printer(as_json) as printer:
        kept = _registry(registry)
        _give(printer, kept, kept.resolve(reference))


@adapters.command()
def tag(
    reference: Reference,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Such as prod.")],
    registry: Folder = None,
    as_json: Json = False,
) -> None:
    """Point a tag at a version; it moves in one step."""
    with show.Printer(as_json) as printer:
        version = _registry(registry).tag(reference, tag)
        name = reference.partition("@")[0]
        answer = {"name": name, "tag": tag, "version": version.hash}
        printer.give(answer, lambda: f"{name}@{tag} is {version.short}")


@adapters.command()
def untag(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    tag: Annotated[str, typer.Argument(metavar="TAG")],
    registry: Folder = None,
    as_json: Json = False,
) -> None:
    """Take a tag away; the version stays."""
    with show.Printer(as_json) as printer:
        _registry(registry).untag(name, tag)
        printer.give({"name": name, "untagged": tag}, lambda: f"{name}@{tag} is gone")


@adapters.command()
def diff(one: Reference, other: Reference, registry: Folder = None, as_json: Json = False) -> None:
    """Show where the settings of two adapters differ, and both sides' held-out figures."""
    from pennyweight.registry import difference

    with show.Printer(as_json) as printer:
        kept = _registry(registry)
        pair = kept.resolve(one), kept.resolve(other)
        found = difference(*pair)
        answer = {"versions": [each.hash for each in pair], **show.plain_fields(found)}
        printer.give(answer, lambda: _different(one, other, found))


@adapters.command()
def lineage(reference: Reference, registry: Folder = None, as_json: Json = False) -> None:
    """Say where an adapter comes from: its base, its data, its receipt, its forebears."""
    with show.Printer(as_json) as printer:
        kept = _registry(registry)
        line = kept.lineage(kept.resolve(reference))
        rows = [
            {
                "version": each.hash,
                "names": kept.names_of(each),
                "base": dict(each.base),
                "data": each.data,
                "receipt": each.files.get("receipt.json"),
                "parent": each.parent,
                "merged_from": list(each.merged_from),
            }
            for each in line
        ]
        printer.give({"lineage": rows}, lambda: "\n\n".join(map(_descent, rows)))


@adapters.command()
def uniform(
    reference: Reference,
    name: Name,
    tag: Tags = None,
    registry: Folder = None,
    as_json: Json = False,
) -> None:
    """Keep the same adapter in the form every server loads: one rank, alpha over rank."""
    from pennyweight.registry import keep_uniform

    with show.Printer(as_json) as printer:
        kept = _registry(registry)
        version = keep_uniform(kept, reference, name=name, tags=tag or ())
        _give(printer, kept, version)


@adapters.command()
def push(
    reference: Reference,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A folder, hf://OWNER/NAME, s3://..., gs://...")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new Hub repository public.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Another version that lies there gives way.")
    ] = False,
    registry: Folder = None,
    as_json: Json = False,
) -> None:
    """Write an adapter to a folder, a bucket or the Hugging Face Hub, in PEFT's layout."""
    from pennyweight.registry import push as send

    with show.Printer(as_json) as printer:
        version = _registry(registry).resolve(reference)
        sent = send(version, target, public=public, replace=replace)
        name = reference.partition("@")[0]
        again = f"pennyweight adapters pull {sent.address} --name {name} --expect {version.short}"
        printer.give(
            show.plain_fields(sent), lambda: f"pushed {version.short} to {sent.address}\n{again}"
        )


@adapters.command()
def pull(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="As in push.")],
    name: Name,
    tag: Tags = None,
    expect: Annotated[
        str | None, typer.Option(help="The version it must be, in whole or its first digits.")
    ] = None,
    registry: Folder = None,
    as_json: Json = False,
) -> None:
    """Fetch an adapter from where push writes, or any PEFT adapter, and keep it."""
    from pennyweight.registry import pull as fetch

    with show.Printer(as_json) as printer:
        kept = _registry(registry)
        version = fetch(kept, source, name=name, tags=tuple(tag or ()), expect=expect)
        _give(printer, kept, version)


@adapters.command()
def remove(reference: Reference, registry: Folder = None, as_json: Json = False) -> None:
    """Take a name, or one version of it, away; files go with their last name."""
    with show.Printer(as_json) as printer:
        gone = _registry(registry).remove(reference)
        told = f"{reference} is gone; {len(gone)} versions bore no other name and are deleted"
        printer.give({"removed": reference, "deleted": gone}, lambda: told)


def _registry(folder: Path | None) -> Registry:
    from pennyweight.registry import Registry

    return Registry(folder)


def _figures(version: Version) -> dict[str, Any]:
    told = version.held_out() or {}
    return {key: told.get(key) for key in ("rows", "loss_before", "loss_after")}


def _listed(rows: list[dict[str, Any]]) -> Any:
    columns = ("name", "version", "tags", "base", "r", "loss before", "after", "rows", "added")
    lines = [
        (
            row["name"],
            row["version"][:12],
            ", ".join(row["tags"]),
            row["base"] or "",
            *(_said(row[key]) for key in ("r", "loss_before", "loss_after", "rows")),
            row["added_at"][:16].replace("T", " "),
        )
        for row in rows
    ]
    return show.table(columns, lines, figures=(4, 5, 6, 7))


def _give(printer: show.Printer, kept: Registry, version: Version) -> None:
    from pennyweight.registry import loaders

    answer = {
        **version.to_dict(),
        "names": kept.names_of(version),
        "folder": str(version.folder),
        "held_out": version.held_out(),
        "loaders": [show.plain_fields(each) for each in loaders(version)],
    }
    printer.give(answer, lambda: _told(answer))


def _told(answer: dict[str, Any]) -> str:
    base, trained, held = answer["base"], answer["trained"], answer["held_out"] or {}
    plain = [each["tool"] for each in answer["loaders"] if not each["faults"]]
    refused = {e["tool"]: "; ".join(e["faults"]) for e in answer["loaders"] if e["faults"]}
    facts = {
        "version": answer["version"],
        "names": answer["names"],
        "folder": answer["folder"],
        "base": base.get("name"),
        "base_held_as": base.get("quantization"),
        "base_fingerprint": base.get("fingerprint"),
        "data": answer["data"],
        "parent": answer["parent"],
        "merged_from": answer["merged_from"],
        **trained,
        "held_out_rows": held.get("rows"),
        "loss_before": held.get("loss_before"),
        "loss_after": held.get("loss_after"),
        "loads_as_it_is_in": plain,
        **{f"{tool}": f"no: {why}" for tool, why in refused.items()},
    }
    return "\n".join([show.facts(facts), *(f"note: {note}" for note in answer["notes"])])


def _different(one: str, other: str, found: Any) -> Any:
    from rich.console import Group

    rows = [(key, *map(_said, pair)) for key, pair in found.settings.items()]
    parts: list[Any] = (
        [show.table(("setting", one, other), rows)] if rows else ["no setting differs"]
    )
    if found.figures:
        figures = [(key.replace("_", " "), *map(_said, p)) for key, p in found.figures.items()]
        parts.append(show.table(("held out", one, other), figures, figures=(1, 2)))
    return Group(*parts, *(f"note: {note}" for note in found.notes))


def _descent(row: dict[str, Any]) -> str:
    facts = {
        **row,
        "base": row["base"].get("name"),
        "base_fingerprint": row["base"].get("fingerprint"),
    }
    return show.facts({**facts, "receipt": row["receipt"] and f"sha256 {row['receipt']}"})


def _said(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_said, value)) + "]"
    return str(value)
