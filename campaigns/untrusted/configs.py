"""Runs' descriptions gone wrong, given to the command line: exit code 2, each fault with its line."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator
from pathlib import Path

from campaigns.tally import Tally
from campaigns.untrusted.watch import CANARY, watching
from pennyweight.cli import main as pennyweight
from pennyweight.config import RunConfig, resolve, to_yaml

__all__ = ["run"]

LIMIT_S, MUTATED = 3.0, 120
_ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join('*' + chr(97 + n) for _ in range(9))}]\n"
    for n in range(9)
)
BOMBS = {
    "aliases": _ALIASES,
    "itself": "base: &a {model: *a}\n",
    "lists in lists": "[" * 50_000,
    "tables in tables": "{a: " * 20_000,
    "dashes": "- " * 20_000,
    "many values": "train: [" + "1," * 90_000 + "]\n",
    "many keys": "".join(f"k{n}: 1\n" for n in range(20_000)),
    "one key twice": "seed: 1\nseed: 2\n",
    "a long number": f"seed: {'9' * 5000}\n",
    "a huge number": "seed: 1e999\n",
    "runs code": f"base: !!python/object/apply:os.putenv [{CANARY}, '1']\n",
    "runs code in a key": f"? !!python/object/apply:os.system ['export {CANARY}=1']\n: 1\n",
    "a name of code": "base: !!python/name:os.system\n",
    "an object": "base: !!python/object:pennyweight.config.RunConfig {}\n",
    "binary": "base: !!binary aGk=\n",
    "a merge": "base: {<<: {model: a}}\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "a directive": "%YAML 9.9\n---\nseed: 1\n",
    "no text": "\x00\x01\x02",
    "not Unicode": "seed: '\\ud800'\n",
    "beyond Unicode": 'seed: "\\UFFFFFFFF"\n',
    "a list": "- 1\n",
    "a word": "word\n",
    "tabs": "base:\n\tmodel: a\n",
    "too long": "#" * 5_000_000,
    "an expression that hangs": "adapter: {target_modules: '(.*)*(.*)*\\1'}\n",
    "escape codes": "\"\\e]0;owned\\a\": 1\n",
}  # fmt: skip


def run(tally: Tally, cases: int | None) -> None:
    path = tally.folder / "run.yaml"
    everything = [*BOMBS.items(), *_mutated()]
    chosen = everything if cases is None else everything[:: max(1, len(everything) // cases)]
    longest = 0.0
    for label, text in chosen:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        fault, took = _judge(path)
        longest = max(longest, took)
        tally.case(label, fault)
    tally.remark(f"longest {longest:.2f} s")


def _judge(path: Path) -> tuple[str | None, float]:
    said, code = io.StringIO(), None
    with watching(path.parent) as watched:
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                pennyweight(["plan", str(path)])
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:200]}", 0.0
    text = said.getvalue()
    if code != 2:
        return f"exit code {code}: {text[:200]}", watched.cpu_s
    if watched.seen or "Traceback" in text:
        return f"{watched.seen[:2]} {text[:100]}", watched.cpu_s
    for line in text.splitlines():
        if not line.startswith(("run.yaml:", str(path))) or not line.isprintable():
            return f"a fault without its line: {line[:120]!r}", watched.cpu_s
    return (None if watched.cpu_s < LIMIT_S else f"took {watched.cpu_s:.1f} s"), watched.cpu_s


def _mutated() -> Iterator[tuple[str, str]]:
    """Several mistakes each; an unknown key among them, so that every one has to be refused."""
    dice = random.Random(0)
    whole = to_yaml(resolve(RunConfig()), commented=False).splitlines()
    values = (
        "yes",
        "-1",
        "[1, 2]",
        "{a: b}",
        "1e99",
        "'",
        "*x",
        "&a",
        "!!x",
        "\t",
        "null",
        "nan",
        "é",
        "\x7f",
    )
    for number in range(MUTATED):
        lines = list(whole)
        for _ in range(dice.randrange(1, 6)):
            at = dice.randrange(len(lines))
            key, colon, _ = lines[at].partition(":")
            change = dice.randrange(4)
            if change == 0:
                lines[at] = f"{key}{colon} {dice.choice(values)}"
            elif change == 1:
                lines[at] = key[:-1] + dice.choice("xyz_") + colon + " 1"
            elif change == 2:
                lines.insert(at, lines[at])
            else:
                lines[at] = " " * dice.randrange(9) + lines[at].strip()
        yield f"mutated {number}", "\n".join([*lines, "lerning_rate: 1"]) + "\n"
