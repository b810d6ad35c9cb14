"""The quickstart's story, with a few steps in place of its minutes."""

from __future__ import annotations

from pennyweight.config import Source
from pennyweight.quickstart import quickstart, quickstart_config


def test_the_story_is_told_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pennyweight.quickstart.calibrated", lambda device, config: device)
    whole = quickstart_config(str(tmp_path / "run"))
    short = {"max_steps": 2, "tokens_per_step": 512, "warmup_steps": 1, "eval_steps": 2}
    few = {"max_rows": 4, "generate_rows": 4, "max_new_tokens": 16}
    part = {"train": Source(path="builtin", weight=0.05)}
    whole = whole.model_copy(
        update={
            "data": whole.data.model_copy(update=part),
            "train": whole.train.model_copy(update=short),
            "evaluate": whole.evaluate.model_copy(update=few),
        }
    )
    lines: list[str] = []
    figures = quickstart(str(tmp_path / "run"), lines.append, config=whole)
    told = "\n".join(lines)
    for part in ("What it will take", "⟦", "base:", "adapter:", "Merged", "pennyweight init"):
        assert part in told
    assert {
        "exact_match_before",
        "exact_match_after",
        "train_seconds",
        "peak_memory_bytes",
        "merge_max_logit_difference",
    } <= figures.keys()
    assert figures["merge_max_logit_difference"] < 1e-3
