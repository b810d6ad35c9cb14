"""HumanEval's judge: a completion passes when its problem's own tests run to their end.

pass@k is the chance that one of k drawn answers passes, without bias (Chen et al. 2021, section
2.1): 1 - C(n - c, k) / C(n, k) for c right ones of n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pennyweight.evaluate.tasks.confined import Confinement, run_confined

__all__ = ["judged_apart", "pass_at_k", "program_of"]

FENCE = "```"


def pass_at_k(right: int, drawn: int, k: int) -> float:
    assert 0 <= right <= drawn
    assert k <= drawn, "as many answers as k at least"
    return 1 - math.comb(drawn - right, k) / math.comb(drawn, k)


def program_of(problem: Mapping[str, Any], completion: str) -> str:
    """The problem's beginning, the completion, the problem's tests, and the call of them."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def judged_apart(config: Mapping[str, Any], confinement: Confinement) -> dict[str, Any]:
    """What takes the place of the filter and metric in a task of lm-eval's humaneval family, which
    would run programs in this very process."""
    ks = [k for metric in config["metric_list"] for k in metric["k"]]
    fenced = bool(config.get("gen_prefix"))
    return {
        "filter_list": [
            {
                "name": "create_test",
                "filter": [{"function": "custom", "filter_fn": _completions(fenced)}],
            }
        ],
        "process_results": _judge(ks, confinement),
        "metric_list": [
            {"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in ks
        ],
    }


def _completions(fenced: bool) -> Callable[..., list[list[str]]]:
    """All answers to a problem; where the prompt opened a fence, what stands before its close."""

    def completions(answers: list[list[str]], problems: list[Any]) -> list[list[str]]:
        return [[a.split(FENCE)[0] if fenced else a for a in drawn] for drawn in answers]

    return completions


def _judge(ks: Sequence[int], confinement: Confinement) -> Callable[..., dict[str, float]]:
    def judge(problem: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
        (drawn,) = results
        right = sum(
            run_confined(program_of(problem, completion), confinement).passed
            for completion in drawn
        )
        return {f"pass@{k}": pass_at_k(right, len(drawn), k) for k in ks}

    return judge
