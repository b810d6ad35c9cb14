"""Settings that do not go together, said with the reason and the mend; and what follows from what.

Each rule is one entry of RULES: the checks of a run and `pennyweight explain KEY` both read it.
A setting counts as given when somebody wrote it down; defaults never break a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight.config.keys import KEYS, value_at
from pennyweight.config.schema import RunConfig, Source
from pennyweight.errors import AdapterError, ConfigError
from pennyweight.patterns import pattern

__all__ = ["REPLACES", "RULES", "Rule", "broken_rules", "given_keys", "origins", "resolve"]

Given = frozenset[str]


@dataclass(frozen=True, slots=True)
class Rule:
    """`keys[0]` is where the fault stands; `needs` says what must hold and the mend."""

    keys: tuple[str, ...]
    needs: str
    broken: Callable[[RunConfig, Given], bool]


def _targets_are_no_pattern(run: RunConfig, given: Given) -> bool:
    targets = run.adapter.target_modules
    if not isinstance(targets, str):
        return False
    try:
        pattern(targets)
    except AdapterError:
        return True
    return False


def _same_rows(run: RunConfig, given: Given) -> bool:
    def named(rows: Any) -> set[tuple[str, str | None]]:
        listed = rows if isinstance(rows, tuple) else () if rows is None else (rows,)
        sources = [Source(path=row) if isinstance(row, str) else row for row in listed]
        return {(row.path, row.split) for row in sources if row.path != "builtin"}

    return bool(named(run.data.train) & named(run.data.eval))


def _four_bits(run: RunConfig) -> bool:
    return run.base.quantization in ("nf4", "fp4")


def _names_no_arm(run: RunConfig) -> bool:
    """Whether a learning rate is given for what could not be an arm."""
    arm = re.compile(r"full|q?lora(-r[1-9][0-9]*)?")
    return not all(arm.fullmatch(name) for name in run.compare.learning_rates)


def _nothing_held_out(run: RunConfig) -> bool:
    return run.data.eval is None and run.data.eval_fraction == 0


REPLACES: tuple[tuple[str, str], ...] = (
    ("train.max_steps", "train.epochs"),
    ("train.tokens_per_step", "train.batch_size"),
)
"""Pairs of which one alone can count. Given on the command line, either takes the place of the other
in the file; given together in one place they are refused.
"""

RULES: tuple[Rule, ...] = (
    Rule(
        ("train.method", "base.quantization"),
        "method qlora trains on a quantized base: set base.quantization to nf4, "
        "or train.method to lora",
        lambda run, given: run.train.method == "qlora" and run.base.quantization == "none",
    ),
    Rule(
        ("base.quantization", "train.method"),
        "method lora keeps its base unquantized: remove base.quantization, "
        "or set train.method to qlora",
        lambda run, given: (
            run.train.method == "lora"
            and "base.quantization" in given
            and run.base.quantization != "none"
        ),
    ),
    Rule(
        ("base.quantization", "train.method"),
        "method full trains every weight, and a quantized one cannot be trained: "
        "remove base.quantization, or set train.method to qlora",
        lambda run, given: (
            run.train.method == "full"
            and "base.quantization" in given
            and run.base.quantization != "none"
        ),
    ),
    Rule(
        ("base.double_quantization", "base.quantization"),
        "double quantization is of 4-bit block scales: set base.quantization to nf4 or fp4, "
        "or remove base.double_quantization",
        lambda run, given: (
            run.base.double_quantization
            and "base.double_quantization" in given
            and not (_four_bits(run) and run.train.method == "qlora")
        ),
    ),
    Rule(
        ("train.method", "adapter"),
        "method full has no adapter: remove the adapter settings, or set train.method to lora",
        lambda run, given: (
            run.train.method == "full" and any(key.startswith("adapter.") for key in given)
        ),
    ),
    Rule(
        ("base.embedding_device", "train.method", "adapter.modules_to_save"),
        "embeddings in host memory are looked up, not trained: remove base.embedding_device, "
        "or train by qlora or lora without embeddings in adapter.modules_to_save",
        lambda run, given: (
            run.base.embedding_device == "host"
            and (
                run.train.method == "full"
                or any("embed" in name or "wte" in name for name in run.adapter.modules_to_save)
            )
        ),
    ),
    Rule(
        ("adapter.target_modules",),
        "a text is one of all-linear, attention, mlp, or a regular expression that compiles; "
        "write several names as a list",
        _targets_are_no_pattern,
    ),
    Rule(
        ("data.eval", "data.train"),
        "held-out rows must not be trained on: name other rows, or remove data.eval and let "
        "data.eval_fraction set some apart",
        _same_rows,
    ),
    Rule(
        ("data.eval_fraction", "data.eval"),
        "rows are set apart only where data.eval is not given: remove one of the two",
        lambda run, given: run.data.eval is not None and "data.eval_fraction" in given,
    ),
    Rule(
        ("data.train_on", "data.format"),
        "plain text has no turns: remove data.train_on, or set it to all",
        lambda run, given: (
            run.data.format == "text" and "data.train_on" in given and run.data.train_on != "all"
        ),
    ),
    Rule(
        ("data.system", "data.format"),
        "plain text has no conversation for a system message to open: remove data.system",
        lambda run, given: run.data.format == "text" and run.data.system is not None,
    ),
    Rule(
        ("data.template", "data.format"),
        "plain text has no turns for a template to print: remove data.template",
        lambda run, given: run.data.format == "text" and run.data.template not in ("auto", "plain"),
    ),
    Rule(
        ("data.prompt_suffix", "data.template"),
        "a chat template writes its own separators: remove data.prompt_suffix, "
        "or set data.template to plain",
        lambda run, given: bool(run.data.prompt_suffix) and run.data.template == "chatml",
    ),
    Rule(
        ("train.epochs", "train.max_steps"),
        "max_steps decides the length of a run and epochs would be ignored: remove one of the two",
        lambda run, given: run.train.max_steps is not None and "train.epochs" in given,
    ),
    Rule(
        ("train.tokens_per_step", "data.packing"),
        "a token budget is filled by packing: set data.packing to true, or use train.batch_size "
        "and train.gradient_accumulation_steps",
        lambda run, given: run.train.tokens_per_step is not None and not run.data.packing,
    ),
    Rule(
        ("train.batch_size", "train.tokens_per_step"),
        "tokens_per_step replaces batch_size: remove one of the two",
        lambda run, given: run.train.tokens_per_step is not None and "train.batch_size" in given,
    ),
    Rule(
        ("train.tokens_per_step", "data.max_length", "train.gradient_accumulation_steps"),
        "each micro-batch (tokens_per_step / gradient_accumulation_steps) must hold the longest "
        "row: raise train.tokens_per_step, or lower data.max_length",
        lambda run, given: (
            run.train.tokens_per_step is not None
            and run.train.tokens_per_step // run.train.gradient_accumulation_steps
            < run.data.max_length
        ),
    ),
    Rule(
        ("train.warmup_ratio", "train.warmup_steps"),
        "warmup_steps replaces warmup_ratio: remove one of the two",
        lambda run, given: run.train.warmup_steps is not None and "train.warmup_ratio" in given,
    ),
    Rule(
        ("train.warmup_steps", "train.max_steps"),
        "warm-up must end before the run does: lower train.warmup_steps below train.max_steps",
        lambda run, given: (
            run.train.max_steps is not None and (run.train.warmup_steps or 0) >= run.train.max_steps
        ),
    ),
    Rule(
        ("train.min_lr_ratio", "train.lr_scheduler_type"),
        "a constant schedule never comes down: remove train.min_lr_ratio, "
        "or set train.lr_scheduler_type to cosine",
        lambda run, given: run.train.lr_scheduler_type == "constant" and run.train.min_lr_ratio > 0,
    ),
    Rule(
        ("train.early_stopping_patience", "data.eval_fraction"),
        "stopping early needs held-out rows: give data.eval, or a data.eval_fraction above 0",
        lambda run, given: run.train.early_stopping_patience is not None and _nothing_held_out(run),
    ),
    Rule(
        ("train.eval_steps", "data.eval_fraction"),
        "evaluating needs held-out rows: give data.eval, or a data.eval_fraction above 0",
        lambda run, given: run.train.eval_steps is not None and _nothing_held_out(run),
    ),
    Rule(
        ("compare.learning_rates",),
        "each name is an arm: full, lora or qlora, or an adapter of one rank, such as lora-r16",
        lambda run, given: _names_no_arm(run),
    ),
    Rule(
        ("compare.ranks", "adapter.rank_pattern"),
        "a pattern of ranks would be the same in every arm: remove adapter.rank_pattern and "
        "adapter.alpha_pattern, or compare.ranks",
        lambda run, given: (
            bool(run.compare.ranks) and bool(run.adapter.rank_pattern or run.adapter.alpha_pattern)
        ),
    ),
    Rule(
        ("compare.range_to", "compare.range_from"),
        "the range test goes upwards: set compare.range_to above compare.range_from",
        lambda run, given: run.compare.range_to <= run.compare.range_from,
    ),
    Rule(
        ("adapters.list", "train.method"),
        "method full trains the base itself, and many adapters share it: set train.method to qlora "
        "or lora, or remove adapters",
        lambda run, given: (
            run.train.method == "full" and bool(run.adapters.list or run.adapters.grid)
        ),
    ),
    Rule(
        ("adapters.stop", "data.eval_fraction"),
        "losers are told by held-out rows: give data.eval, or a data.eval_fraction above 0",
        lambda run, given: run.adapters.stop != "none" and _nothing_held_out(run),
    ),
    Rule(
        ("adapters.stop_margin", "adapters.stop"),
        "a margin is read only where adapters.stop is margin: set it, or remove "
        "adapters.stop_margin",
        lambda run, given: "adapters.stop_margin" in given and run.adapters.stop != "margin",
    ),
)


# What a value that nobody gave was filled in from.
FOLLOWS_FROM = {
    "base.quantization": "train.method",
    "base.double_quantization": "base.quantization",
    "train.learning_rate": "train.method",
}


def given_keys(run: RunConfig) -> Given:
    """Keys that somebody wrote down (`train.method`), from a file, a command line or Python."""
    given = {key for key in run.model_fields_set if key in ("output_dir", "seed")}
    for group in ("base", "adapter", "data", "train", "evaluate", "compare", "adapters"):
        settings = getattr(run, group)
        given |= {
            f"{group}.{name}"
            for name in settings.model_fields_set
            if getattr(settings, name) is not None
        }
    return frozenset(given)


def broken_rules(run: RunConfig) -> list[Rule]:
    """Every rule that the run breaks, in the order of RULES."""
    given = given_keys(run)
    return [rule for rule in RULES if rule.broken(run, given)]


def origins(run: RunConfig, written: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where the value of each key of the resolved run comes from.

    `written` is what is known of a file and a command line (`run.yaml:12`); without it the run was
    made in Python. Of a value that `resolve` filled in it is the key that decided it.
    """
    given, resolved = given_keys(run), resolve(run)
    found = {}
    for key in KEYS:
        known = (written or {}).get(key) or ("Python" if key in given else "default")
        filled = value_at(run, key) != value_at(resolved, key)
        found[key] = f"follows from {FOLLOWS_FROM[key]}" if filled else known
    return found


def resolve(run: RunConfig) -> RunConfig:
    """The run with every value that follows from others filled in; resolving twice is once.

    Raises ConfigError naming every broken rule.
    """
    if broken := broken_rules(run):
        raise ConfigError.all(f"{rule.keys[0]}: {rule.needs}" for rule in broken)
    base: dict[str, Any] = {}
    if run.train.method != "qlora":
        base["quantization"] = "none"
    if base.get("quantization", run.base.quantization) not in ("nf4", "fp4"):
        base["double_quantization"] = False
    train: dict[str, Any] = {}
    if run.train.learning_rate is None:
        train["learning_rate"] = 2e-5 if run.train.method == "full" else 2e-4
    return run.model_copy(
        update={
            "base": run.base.model_copy(update=base),
            "train": run.train.model_copy(update=train),
        }
    )
