"""What Hugging Face's Trainer and the tools around it share: schedule, optimizer, evaluation, saving.

Names and defaults are those of transformers 5's TrainingArguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pennyweight.config.foreign.account import Account

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "OUTLIERS",
    "UNREAD",
    "bookkeeping",
    "evaluation",
    "finish",
    "optimizer",
    "saving",
    "schedule",
    "steps_and_rates",
]

Number = int | float

_SHAPES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
}
_NEAREST_SHAPE = {
    "polynomial": "linear",
    "warmup_stable_decay": "linear",
    "rex": "linear",
    "reduce_lr_on_plateau": "constant",
    "greedy": "constant",
}

_ADAMW = {
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_apex_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_anyprecision",
    "optimi_adamw",
}
# The Trainer's name: ours.
_OUR_ADAMW = {
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "ao_adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
_SMALLER_ADAMW = {"adamw_torch_4bit", "ao_adamw_4bit", "ao_adamw_fp8"}


BFLOAT16 = "bfloat16 where the device multiplies it fast, else float32"
FLOAT16 = (
    "half precision with a scaled loss; losses are not scaled here, so base.dtype stays auto: "
    "bfloat16 or float32"
)
OUTLIERS = (
    "one scale a row here; bitsandbytes keeps outlier columns in 16 bits beside theirs, so the base "
    "differs a little"
)


def schedule(account: Account, kind_key: str, default: str) -> None:
    """The shape of the learning rate, its end and its warm-up, which `constant` has none of there."""
    kind = account.text(kind_key)
    if kind in _SHAPES:
        account.carry(kind_key, "train.lr_scheduler_type", _SHAPES[kind])
    elif kind is not None:
        nearest = _NEAREST_SHAPE.get(kind, "cosine")
        account.run["train.lr_scheduler_type"] = nearest
        account.lose(kind_key, f"{kind} is not here; {nearest} is the nearest shape and is set")
    elif nearest := default:
        account.assume(kind_key, "train.lr_scheduler_type", nearest)
    _floor(account, kind)
    _warm_up(account, none=kind == "constant")


def _floor(account: Account, kind: str | None) -> None:
    """`lr_scheduler_kwargs`: where the cosine ends; anything else in it is lost."""
    more = account.part("lr_scheduler_kwargs")
    if more is None:
        return
    ratio, least = more.number("min_lr_rate"), more.number("min_lr")
    peak = account.number("learning_rate")
    ends = "min_lr" in (kind or "")
    if ratio is not None and ends:
        more.carry("min_lr_rate", "train.min_lr_ratio", ratio)
    elif least is not None and ends and peak:
        more.carry("min_lr", "train.min_lr_ratio", least / peak, "as a share of the peak")
    for key in more.open_keys():
        if key == "num_cycles" and more.number(key) == 0.5:
            more.same(key)
        else:
            more.lose(key, "shapes the schedule in a way that is not here")


def _warm_up(account: Account, *, none: bool) -> None:
    steps, ratio = account.number("warmup_steps"), account.number("warmup_ratio")
    if none:
        for key in ("warmup_steps", "warmup_ratio"):
            if key in account:
                account.unneeded(key, "constant has no warm-up there (constant_with_warmup has)")
        account.assume("warmup_steps", "train.warmup_steps", 0)
    elif steps and steps >= 1:
        account.carry("warmup_steps", "train.warmup_steps", int(steps))
        if "warmup_ratio" in account:
            account.unneeded("warmup_ratio", "warmup_steps counts where both are given")
    elif steps:
        account.carry("warmup_steps", "train.warmup_ratio", steps, "a share, being below 1")
    elif ratio is not None:
        account.carry("warmup_ratio", "train.warmup_ratio", ratio)
    elif steps == 0:
        account.carry("warmup_steps", "train.warmup_steps", 0)
    elif account.tool == "axolotl":
        said = "3 % of the steps, there at most 100 of them"
        account.assume("warmup_steps", "train.warmup_ratio", 0.03, said)
    else:
        account.assume("warmup_steps", "train.warmup_steps", 0, "no warm-up")


def optimizer(account: Account, key: str) -> None:
    """Every AdamW is ours; of the others only the name can be said."""
    named = account.text(key)
    if named in _ADAMW:
        account.same(key, "AdamW, its moments in float32")
    elif named in _OUR_ADAMW:
        account.carry(key, "train.optim", _OUR_ADAMW[named])
    elif named in _SMALLER_ADAMW:
        account.carry(
            key,
            "train.optim",
            "adamw_8bit",
            f"{named} is not here; 8 bits are the nearest, and what is learned is the same but for "
            "rounding",
        )
    elif named is not None:
        account.lose(
            key,
            f"{named} is not here and AdamW is used; the learning rate was chosen for {named}, so "
            "try a few (AdamW's usual one for LoRA is 1e-4 to 3e-4)",
        )


def steps_and_rates(account: Account, *, rate: float) -> None:
    """What the Trainer's own arguments say of steps, schedule and optimizer; `rate`: its default."""
    account.carry_or_assume(
        "learning_rate", "train.learning_rate", account.number("learning_rate"), rate
    )
    rows_key = "per_device_train_batch_size"
    if "per_gpu_train_batch_size" in account:
        rows_key = "per_gpu_train_batch_size"
    account.carry_or_assume(rows_key, "train.batch_size", account.whole(rows_key), 8)
    steps, epochs = account.whole("max_steps"), account.number("num_train_epochs")
    if steps and steps > 0:
        account.carry("max_steps", "train.max_steps", steps)
        if epochs is not None:
            account.unneeded("num_train_epochs", "max_steps decides the length")
    else:
        account.carry_or_assume("num_train_epochs", "train.epochs", epochs, 3.0)
        if steps is not None:
            account.same("max_steps", "num_train_epochs decides the length")
    schedule(account, "lr_scheduler_type", "linear")
    optimizer(account, "optim")
    for key in ("gradient_accumulation_steps", "weight_decay", "adam_beta1", "adam_beta2"):
        if (value := account.number(key)) is not None:
            whole = key == "gradient_accumulation_steps"
            account.carry(key, f"train.{key}", int(value) if whole else value)
    if (value := account.number("adam_epsilon")) is not None:
        account.carry("adam_epsilon", "train.adam_epsilon", value)
    if (norm := account.number("max_grad_norm")) is not None:
        account.carry("max_grad_norm", "train.max_grad_norm", norm or None, "" if norm else "off")
    for key in ("gradient_checkpointing", "activation_checkpointing"):
        if (again := account.truth(key)) is not None:
            account.carry(key, "train.gradient_checkpointing", again)
    _precision(account)
    for key in ("use_cpu", "no_cuda"):
        if account.truth(key):
            account.carry(key, "base.device", "cpu")


def _precision(account: Account) -> None:
    for key in ("bf16", "pure_bf16"):
        if account.read(key) == "auto" or account.truth(key):
            account.carry(key, "base.dtype", "auto", BFLOAT16)
    if account.truth("fp16"):
        account.lose("fp16", FLOAT16)


def evaluation(account: Account, *, held_out: bool) -> None:
    """When held-out rows are measured; without any there is nothing to carry."""
    when = account.text("eval_strategy") or account.text("evaluation_strategy")
    named = "eval_strategy" if "eval_strategy" in account else "evaluation_strategy"
    if not held_out:
        account.idle(
            "nothing is held out there", named, "eval_steps", "do_eval", "evaluation_strategy"
        )
        return
    if when == "epoch":
        account.lose(named, "measured after each epoch; here ten times a run, or train.eval_steps")
    elif when is not None:
        account.same(named, "held-out rows are measured during the run")
    if "do_eval" in account:
        account.same("do_eval")
    if (steps := account.number("eval_steps")) is not None and when != "epoch":
        _every(account, "eval_steps", steps, "train.eval_steps", "ten evaluations a run")
    account.idle(f"{named} says when", "evaluation_strategy", "eval_steps")


def saving(account: Account) -> None:
    when, steps = account.text("save_strategy"), account.number("save_steps")
    if when == "steps" or (when == "best" and steps is None):
        account.same("save_strategy")
    elif when is not None:
        account.lose(
            "save_strategy",
            f"{when}; here a checkpoint is written with each evaluation, or every train.save_steps",
        )
    if steps is not None and when in (None, "steps"):
        _every(account, "save_steps", steps, "train.save_steps", "one with each evaluation")
    elif steps is not None:
        account.unneeded("save_steps", f"not looked at where save_strategy is {when}")
    if (kept := account.whole("save_total_limit")) is not None and kept >= 1:
        account.carry("save_total_limit", "train.save_total_limit", kept)


def _every(account: Account, key: str, steps: Number, to: str, otherwise: str) -> None:
    """A count of steps; below 1 it is a share of all steps, which is known only with max_steps."""
    total = account.whole("max_steps")
    if steps >= 1:
        account.carry(key, to, int(steps))
    elif total and total > 0:
        account.carry(key, to, max(1, round(steps * total)), "its share of max_steps")
    else:
        account.lose(
            key, f"every {steps:.0%} of all steps; {otherwise} here, or {to} as a count of steps"
        )


def bookkeeping(account: Account, *, output_dir: str, seed_default: int = 42) -> None:
    """Folder, seed, progress lines and tracking services."""
    account.carry_or_assume("output_dir", "output_dir", account.text("output_dir"), output_dir)
    seed = account.whole("seed")
    said = "the same number, another stream: shuffles and A's first values differ"
    account.carry_or_assume("seed", "seed", seed, seed_default, said=said, assumed=said)
    if (steps := account.number("logging_steps")) is not None:
        _every(account, "logging_steps", steps, "train.logging_steps", "a line every 10 steps")
    if account.truth("load_best_model_at_end"):
        account.same("load_best_model_at_end", "the best weights on the held-out rows are kept")
    elif "load_best_model_at_end" in account:
        account.lose("load_best_model_at_end", "the last weights there; here the best are kept")
    metric = account.text("metric_for_best_model")
    if metric in ("loss", "eval_loss"):
        account.same("metric_for_best_model", "the held-out loss")
    elif metric is not None:
        account.lose("metric_for_best_model", "here the held-out loss decides which is best")
    _trackers(account)


def _trackers(account: Account) -> None:
    services = account.words("report_to")
    if services is None:
        return
    known = [each for each in services if each in ("wandb", "tensorboard")]
    others = [each for each in services if each not in (*known, "none")]
    if known:
        account.carry("report_to", "train.report_to", known)
    if others:
        account.lose("report_to", f"{', '.join(others)}: only wandb and tensorboard are here")
    elif not known:
        account.same("report_to", "events.jsonl only")


UNREAD = "it has no meaning beside the file's other settings that could be carried"


def finish(
    account: Account,
    known: Iterable[str],
    unneeded: Mapping[str, str],
    lost: Mapping[str, str],
) -> None:
    """Tell of every key that is still open: by the tables, as empty, or as unknown."""
    every = [*known, *unneeded, *lost]
    for key in account.open_keys():
        value = account.read(key)
        if key in every and _is_off(value):
            account.same(key, "empty or off there, as here")
        elif key in unneeded:
            account.unneeded(key, unneeded[key])
        elif key in lost:
            account.lose(key, lost[key])
        elif key in known:
            account.lose(key, UNREAD)
        else:
            near = difflib.get_close_matches(key, every, 1, cutoff=0.75)
            meant = f"did you mean {near[0]}? " if near else ""
            account.unknown(
                key,
                f"no setting of {account.tool} that is known here; {meant}Nothing was done with it",
            )


def _is_off(value: Any) -> bool:
    return value in (None, False, 0, "", "no", "off", "false", "none") or value in ([], {})
