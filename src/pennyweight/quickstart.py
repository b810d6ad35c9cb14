"""The whole story on the built-in model and task, in a few minutes on a CPU.

What fits, a row as it is trained, training, exact match before and after, three questions answered
by base and adapter side by side, the merged folder held against the adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pennyweight.calibrate import calibrated
from pennyweight.config import RunConfig
from pennyweight.finetune import finetune, look
from pennyweight.plan import named_device, plan
from pennyweight.runs import evaluate_run, merge_run, open_chat
from pennyweight.runs.folder import RunFolder

__all__ = ["quickstart", "quickstart_config"]

QUESTIONS = 3
TOLD = frozenset(
    {
        "linear weights",
        "embeddings, head, norms",
        "adapter",
        "optimizer",
        "activations",
        "loss",
        "process",
        "peak",
        "trained parameters",
        "training time",
    }
)


def quickstart_config(output_dir: str = "runs/quickstart") -> RunConfig:
    """The run that the quickstart makes; `config.json` in its folder says every value."""
    return RunConfig.model_validate(
        {
            "base": {"model": "builtin", "quantization": "nf4", "device": "auto"},
            "adapter": {"r": 16, "lora_alpha": 32},
            "data": {"train": "builtin", "max_length": 384},
            "train": {
                "method": "qlora",
                "learning_rate": 3e-3,
                "max_steps": 240,
                "tokens_per_step": 3072,
                "warmup_steps": 12,
                "eval_steps": 80,
            },
            "evaluate": {"max_rows": 200, "generate_rows": 200, "max_new_tokens": 96},
            "output_dir": output_dir,
        }
    )


def quickstart(
    output_dir: str, say: Callable[[str], None] = print, *, config: RunConfig | None = None
) -> dict[str, Any]:
    """Run it all; `say` takes the lines for people. Gives the figures that the story ends on.

    `config` is another run to tell the same story of.
    """
    config = config or quickstart_config(output_dir)
    merged = Path(output_dir) / "merged"
    _heading(say, "What it will take")
    device = calibrated(named_device(config.base.device), config)
    predicted = plan(config, device=device)
    for what, size, remark in predicted.table_rows():
        if what in TOLD:
            say(f"{what:<24}{size:>10}  {remark}")
    say(predicted.sentence())
    _heading(say, "A row as it is trained: only what stands between the brackets")
    seen = look(config, rows=1)
    for shown in seen.shown:
        say("".join(f"⟦{s.text}⟧" if s.trained else s.text for s in shown.segments))
    _heading(say, "QLoRA on this machine")
    result = finetune(config)
    _heading(say, "Functions from modules it never saw")
    measured = evaluate_run(output_dir)
    before, after = measured["base"]["correct"], measured["tuned"]["correct"]
    for name, arm in (("base", measured["base"]), ("adapter", measured["tuned"])):
        low, high = arm["correct_interval_95"]
        say(
            f"{name:>8}: {arm['correct']:6.1%} of {arm['answers']} answers right "
            f"(95 % interval {low:.1%} to {high:.1%}), loss {arm['loss']:.3f}"
        )
    _side_by_side(output_dir, say)
    _heading(say, "Merged into one plain Hugging Face folder")
    shutil.rmtree(merged, ignore_errors=True)
    report = merge_run(output_dir, merged, dtype="float32", say=say)
    say(
        f"{merged}, onto the base {report.onto}: largest logit difference from the adapter "
        f"{report.agreement.max_logit_difference:.2g}, the same likeliest token in "
        f"{report.agreement.top1_agreement:.2%} of {report.agreement.tokens:,} places"
    )
    _heading(say, "Now with your own data")
    say("pennyweight init --model Qwen/Qwen3-0.6B --data my.jsonl > run.yaml")
    say("pennyweight train run.yaml")
    return {
        "exact_match_before": before,
        "exact_match_after": after,
        "train_seconds": result.train_seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "merge_max_logit_difference": report.agreement.max_logit_difference,
        "loss_before": measured["base"]["loss"],
        "loss_after": measured["tuned"]["loss"],
        "answers": measured["tuned"]["answers"],
        "planned_peak_bytes": result.planned_peak_bytes,
        "output_dir": output_dir,
    }


def _side_by_side(output_dir: str, say: Callable[[str], None]) -> None:
    """Three held-out questions, answered by the base and by the adapter."""
    folder = RunFolder(Path(output_dir))
    most = folder.config().evaluate.max_new_tokens
    tuned = open_chat(output_dir, max_new_tokens=most)
    base = open_chat(output_dir, None, max_new_tokens=most)
    for question in folder.read_held_out().questions[:QUESTIONS]:
        prompt = tuned.renderer.decode(question.prompt_ids)
        _heading(say, question.source)
        say(prompt.strip())
        for name, session in (("base", base), ("adapter", tuned)):
            say(f"{name:>8}: {session.answer(question.prompt_ids).strip()[:200]!r}")
        say(f"{'right':>8}: {question.reference!r}")


def _heading(say: Callable[[str], None], text: str) -> None:
    say(f"\n── {text} " + "─" * max(0, 76 - len(text)))
