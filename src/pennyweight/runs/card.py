"""The model cards (README.md with the Hub's front matter), written from the receipt alone.

One of an adapter or a whole tuned model, one of a merged folder. All that stands in them comes from
`receipt.json` and `merge.json`, so they hold nothing private either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pennyweight.lora.card import front_matter, in_code
from pennyweight.plan.table import as_duration, as_size
from pennyweight.runs.usage import adapter_usage, whole_usage

__all__ = ["merged_card", "run_card"]

FULL_NAMES = {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}


def run_card(receipt: Mapping[str, Any]) -> str:
    """The card of what a run left: an adapter, or a whole model."""
    adapter, base = receipt["adapter"], receipt["base"]
    named = in_code(base["model"])
    kind = f"a {FULL_NAMES[receipt['method']]} adapter for" if adapter else "a tuned"
    tags = ["pennyweight", *(("lora",) if adapter else ()), receipt["method"]]
    parts = [
        _front(receipt, tags, library_name="peft" if adapter else "transformers"),
        f"# {_plain(receipt['name'])}: {kind} {named}",
        _what(receipt),
        *_worth(receipt),
        *_plan(receipt),
        *_data(receipt),
        "## How to use it",
        *(adapter_usage(receipt) if adapter else whole_usage(receipt)),
        *_how(receipt),
        *_limits(receipt),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def merged_card(merged: Mapping[str, Any], receipt: Mapping[str, Any] | None) -> str:
    """The card of a merged folder: what was merged and what that cost, then what the run said."""
    base_model = merged["base"]["model"]
    onto = {
        "as-trained": "the weights the adapter was trained beside, dequantized where they were quantized",
        "original": "the weights of the base's own files",
    }[merged["onto"]]
    told = receipt or {"base": merged["base"], "data": {"hub_ids": []}}
    parts = [
        _front(told, ["pennyweight", "merged"], library_name="transformers"),
        f"# {_plain(merged['name'])}: {in_code(base_model)} with an adapter folded in",
        f"A LoRA adapter was folded into {onto} ({merged['modules']} modules, weights "
        f"{merged['dtype']}). It is a plain Hugging Face folder.",
        "## What the merge cost",
        f"On {merged['rows']:,} {merged['measured_on']} ({merged['agreement']['tokens']:,} tokens), "
        "beside the unmerged adapter. KL and loss in nats a token.",
        _merge_table(merged),
        f"Kept: {merged['onto']}, because {merged['why']}."
        + "".join(f"\n\n{_plain(notice)}" for notice in merged["notices"]),
        *(_worth(receipt, "What the adapter was worth") if receipt else ()),
        *(_data(receipt) if receipt else ()),
        "## How to use it",
        *whole_usage(told),
        *(_how(receipt) if receipt else ()),
        *_limits(receipt),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front(receipt: Mapping[str, Any], tags: Sequence[str], *, library_name: str) -> str:
    base, datasets = receipt["base"], receipt["data"]["hub_ids"]
    hub_id = base["hub_id"] and base["hub_id"].partition("@")[0]
    return front_matter(
        base_model=hub_id,
        base_model_relation=hub_id and ("adapter" if library_name == "peft" else "finetune"),
        library_name=library_name,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
        datasets=sorted({each.partition("@")[0] for each in datasets}),
        **{key: base.get(key) for key in ("license", "license_name", "license_link")},
    )


def _what(receipt: Mapping[str, Any]) -> str:
    adapter, base = receipt["adapter"], receipt["base"]
    held = base["quantization"] + (" with double quantization" * bool(base["double_quantization"]))
    told = f"{receipt['result']['trained_parameters']:,} trained parameters"
    if adapter:
        whole = ", ".join(adapter["trained_whole"])
        told = (
            f"Rank {adapter['r']}, alpha {adapter['lora_alpha']:g}"
            + (" (rsLoRA)" if adapter["use_rslora"] else "")
            + f", {told}"
            + (f"; trained whole: {whole}" if whole else "")
            + f". Trained beside {in_code(base['model'])} held as "
            + (held if base["quantization"] != "none" else f"{base['dtype']}, not quantized")
        )
    return f"{told}. Made with Pennyweight {receipt['versions']['pennyweight']}; every figure below is from its receipt (`receipt.json`)."


def _worth(receipt: Mapping[str, Any], title: str = "What it was worth") -> list[str]:
    held = receipt["held_out"]
    if held is None:
        return [f"## {title}", "No rows were held out, so it was not measured."]
    before, after, change = held["before"], held["after"], held["difference"]
    rows = [
        (
            "loss, nats a token",
            *(_with_interval(arm, "loss") for arm in (before, after)),
            _change(change),
        ),
        ("perplexity", *(_figure(arm and arm["perplexity"]) for arm in (before, after)), ""),
        ("tokens right", *(_share(arm and arm["token_accuracy"]) for arm in (before, after)), ""),
    ]
    return [
        f"## {title}",
        f"On {held['rows']:,} held-out rows, {after['trained_tokens']:,} answer tokens; 95 % intervals "
        "in brackets.",
        _table(("", "base", "tuned", "difference"), rows),
    ]


def _plan(receipt: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            each["what"],
            *(_sized(each["unit"], each[side]) for side in ("planned", "measured")),
        )
        for each in receipt["plan_against_measured"]
    ]
    machine = receipt["machine"]
    where = f"{machine['device_name']}, {machine['system']}".removeprefix(", ")
    resumed = receipt["resumed_after"]
    told = f"On {_plain(where)}, device {machine['device']}; the time was planned for an idle one."
    if resumed:
        told += f" Taken up again after step {', '.join(f'{step:,}' for step in resumed)}."
    return ["## Planned and measured", told, _table(("", "planned", "measured"), rows)]


def _data(receipt: Mapping[str, Any]) -> list[str]:
    data = receipt["data"]
    rows, rendering = data["rows"], data["rendering"]
    names = ", ".join(in_code(name) for name in data["train"])
    told = (
        f"{rows['kept']:,} rows of {names}: {rows['tokens']:,} tokens, {rows['trained_tokens']:,} of "
        f"them trained; {rows['cut_rows']:,} rows were cut, {rows['dropped']:,} left out. Rendered with "
        f"{_template(rendering)}. SHA-256 of the data and all that shaped it: "
        f"`{data['fingerprint']}`."
    )
    if rendering["system_message"]:
        told += (
            " A system message opened every conversation without one; it stands in "
            "`chat_template.jinja`."
        )
    return ["## What it was trained on", told]


def _template(rendering: Mapping[str, Any]) -> str:
    name = rendering["template"]
    return (
        "the tokenizer's chat template" if name == "tokenizer" else f"the template {in_code(name)}"
    )


def _how(receipt: Mapping[str, Any]) -> list[str]:
    known = receipt["versions"]
    versions = ", ".join(f"{name} {number}" for name, number in known.items())
    return [
        "## How it was trained",
        f"`pennyweight train run.yaml` with this description (seed {receipt['seed']}; {versions}). Base "
        f"fingerprint `{receipt['base']['fingerprint']}`.",
        f"```yaml\n{receipt['yaml'].replace('```', '')}```",
    ]


def _limits(receipt: Mapping[str, Any] | None) -> list[str]:
    told = [
        "It has the limits of its base, and what its training rows taught it, mistakes included. What "
        "was measured is above; nothing else was: no safety, no fairness, no other task or language."
    ]
    for notice in receipt["notices"] if receipt else ():
        told.append(f"- {_plain(notice)}")
    return ["## Limits", *told]


def _merge_table(merged: Mapping[str, Any]) -> str:
    rows = []
    for model in merged["models"]:
        name = model["name"] + (" (this one)" * (model["name"] == merged["onto"]))
        if "loss" not in model:
            rows.append((name, "refused", *[""] * 4))
            continue
        kept = "" if model["tuning_kept"] is None else f"{model['tuning_kept']:.1%}"
        figures = (f"{model['mean_kl']:.3g}", f"{model['top1_agreement']:.2%}")
        largest = f"{model['max_logit_difference']:.3g}"
        rows.append((name, _with_interval(model, "loss"), kept, *figures, largest))
    columns = ("", "loss", "gain kept", "KL", "same top token", "largest logit difference")
    return _table(columns, rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _with_interval(arm: Mapping[str, Any] | None, measure: str) -> str:
    if arm is None:
        return "unknown"
    between = arm.get(f"{measure}_interval_95")
    return _figure(arm[measure]) + (f" [{between[0]:.4g}, {between[1]:.4g}]" if between else "")


def _change(change: Mapping[str, Any] | None) -> str:
    if change is None:
        return ""
    between = change["interval_95"]
    return f"{change['difference']:+.4g}" + (
        f" [{between[0]:+.4g}, {between[1]:+.4g}]" if between else ""
    )


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "unknown"


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "unknown"


def _sized(unit: str, value: Any) -> str:
    if value is None:
        return "unknown"
    said = {"bytes": as_size, "seconds": as_duration}.get(unit)
    return said(value) if said else f"{value:,}"


def _plain(text: str) -> str:
    """Text that Markdown takes as it is."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))
