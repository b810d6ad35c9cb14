"""Another tool's configuration as a run's YAML, with an account of every key of it.

Nothing is dropped in silence: each key is carried, the same by default, not needed, not carried, or
unknown, and what the other tool would have assumed is written out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from pennyweight.config.document import Path, read_document
from pennyweight.config.explain import to_yaml
from pennyweight.config.foreign import axolotl, llama_factory, peft, trl
from pennyweight.config.foreign.account import Account, Entry, Fate
from pennyweight.config.rules import broken_rules, resolve
from pennyweight.config.schema import RunConfig
from pennyweight.errors import ConfigError, DiskError

__all__ = ["TOOLS", "Entry", "Fate", "Imported", "import_run", "write_run"]

_Translate = Callable[[Account, FilePath], None]

TOOLS: dict[str, tuple[_Translate, tuple[str, ...]]] = {
    name: (tool.translate, (*tool.KEYS, *tool.UNNEEDED, *tool.LOST))
    for name, tool in (
        ("axolotl", axolotl),
        ("llama-factory", llama_factory),
        ("trl", trl),
        ("peft", peft),
    )
}
"""Each tool's translation and every key of it that is known, the most telling first."""


@dataclass(frozen=True, slots=True)
class Imported:
    """`text` is the run's YAML, which `load_run` reads; `files` are to be written beside it.

    `known_by`: the keys that told whose file it is, empty where it was said.
    """

    tool: str
    known_by: tuple[str, ...]
    text: str
    entries: tuple[Entry, ...]
    differences: tuple[str, ...]
    files: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_run(
    path: str | FilePath, tool: str | None = None, *, beside: FilePath | None = None
) -> Imported:
    """Translate a file of `tool` (a key of TOOLS; None: told by its keys).

    `beside`: the folder that the YAML will stand in, where `files` are written too; None: nowhere.
    Raises ConfigError with every fault, each with its line.
    """
    file = FilePath(path)
    tree, lines = _read(file)
    known_by: tuple[str, ...] = ()
    if tool is None:
        tool, known_by = _detect(file, tree)
    account = Account.of_file(file.name, tool, tree, lines)
    TOOLS[tool][0](account, file.parent)
    for name in account.files:
        if beside is None:
            raise ConfigError(
                f"{file.name}: its chat template is written beside the run's YAML as {name}; say "
                "where that goes: --out run.yaml"
            )
        account.run["data.template"] = str(beside / name)
    config = _validated(account)
    if account.run.get("train.method") == "full":
        account.differ("every weight is trained: no adapter is written, a whole model is")
    _always(account)
    text = _heading(file.name, account) + to_yaml(config, beside=account.origins)
    return Imported(
        tool,
        known_by,
        text,
        tuple(sorted(account.entries, key=lambda entry: entry.line or 10**9)),
        tuple(account.differences),
        dict(account.files),
    )


def write_run(found: Imported, out: FilePath) -> None:
    """Write the YAML, and what stands beside it. Nothing that is there is written over."""
    texts = {out: found.text} | {out.parent / name: text for name, text in found.files.items()}
    faults = [f"{path}: exists; remove it or name another" for path in texts if path.exists()]
    if faults:
        raise ConfigError.all(faults)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {error.strerror}") from error


def _read(file: FilePath) -> tuple[dict[str, Any], Mapping[Path, int]]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text at byte {error.start:,}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    # JSON may be indented with tabs, which YAML is not; inside its strings they are escaped.
    document = read_document(text.expandtabs(2) if text.lstrip().startswith("{") else text)
    if document.faults:
        faults = (f"{file.name}:{line}: {said}" for line, said in sorted(document.faults))
        raise ConfigError.all(faults)
    if not isinstance(document.tree, dict):
        raise ConfigError(f"{file.name}: no table of settings, so nothing to import")
    return document.tree, document.lines


def _detect(file: FilePath, tree: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Whose file it is: of the tools that know most of its keys, the one that alone knows some."""
    if {"base", "data", "train"} & set(tree) and "model" in (tree.get("base") or {}):
        raise ConfigError(f"{file.name}: a Pennyweight run already; `pennyweight train {file}`")
    own = {}
    for tool, (_, keys) in TOOLS.items():
        others = {key for name, (_, theirs) in TOOLS.items() if name != tool for key in theirs}
        own[tool] = [key for key in keys if key in tree and key not in others]
    scores = {
        tool: (sum(key in keys for key in tree), len(own[tool]))
        for tool, (_, keys) in TOOLS.items()
    }
    best, second = sorted(scores, key=lambda tool: scores[tool], reverse=True)[:2]
    if not scores[best][0] or scores[best] == scores[second]:
        raise ConfigError(
            f"{file.name}: cannot tell whose file it is by its keys ({', '.join(list(tree)[:8])}); "
            f"name the tool: --from {' | '.join(TOOLS)}"
        )
    return best, tuple(own[best][:4])


def _validated(account: Account) -> RunConfig:
    """The run, once it is one: values in range and no rule broken, else every fault by its line."""
    tree: dict[str, Any] = {}
    for key, value in account.run.items():
        group, _, name = key.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[name] = value
    faults = list(account.faults)
    try:
        run = RunConfig.model_validate(tree)
    except ValidationError as error:
        for each in error.errors():
            key = ".".join(str(part) for part in each["loc"][:2])
            faults.append(f"{account.origins.get(key, key)}: {each['msg']}, as {key}")
        raise ConfigError.all(dict.fromkeys(faults)) from None
    for rule in broken_rules(run):
        given = [account.origins[key] for key in rule.keys if key in account.origins]
        faults.append(f"{' and '.join(given) or rule.keys[0]}: {rule.needs}")
    if faults:
        raise ConfigError.all(faults)
    return resolve(run)


def _always(account: Account) -> None:
    """Differences that hold for every file of these tools."""
    if account.tool == "peft":
        return
    if account.run.get("train.gradient_accumulation_steps", 1) > 1:
        account.differ(
            "loss: here one division, by all trained tokens of the step. The Trainer does that too "
            "since transformers 4.46; before, and over several devices without "
            "average_tokens_across_devices, it took a mean of micro-batch means, in which short "
            "answers weigh more"
        )
    account.differ(
        "devices: batch size x accumulation is that of one device; for N of them there, give "
        "train.gradient_accumulation_steps N times as much"
    )
    account.differ(
        "data: rows left out, cut, repeated or leaked past data.max_*_share refuse the run; "
        "`pennyweight preview` shows them first"
    )


def _heading(name: str, account: Account) -> str:
    """What was lost stands at the top of the YAML too, where the next reader finds it."""
    lost = [e for e in account.entries if e.fate in (Fate.LOST, Fate.UNKNOWN)]
    lines = [f"# Imported from {name} ({account.tool})."]
    if lost:
        lines.append("# Not carried:")
        lines += [f"#   {e.key}: {json.dumps(e.value, ensure_ascii=False)[1:-1]}" for e in lost]
    return "\n".join(lines) + "\n"
