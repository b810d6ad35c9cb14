"""How to use what was tuned, as code to paste: Pennyweight, PEFT, transformers, vLLM.

vLLM takes an adapter's rank from a fixed list and one scaling for all of its modules, and no module
trained whole (vllm.config.lora.MaxLoRARanks, vllm.lora.peft_helper); what does not fit is merged first.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from pennyweight.runs.dressing import EXPORTED

__all__ = ["adapter_usage", "whole_usage"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
HERE = "path/to/this/folder"


def adapter_usage(receipt: Mapping[str, Any]) -> list[str]:
    """Paragraphs and code blocks for an adapter's card."""
    base = receipt["base"]
    settings = [f"model={json.dumps(_base_name(base))}", f'quantization="{base["quantization"]}"']
    if base["quantization"] in ("nf4", "fp4"):
        settings.append(f"double_quantization={base['double_quantization']}")
    ours = f"""
import pennyweight as pw

base = pw.load_base(
    pw.BaseConfig({", ".join(settings)})
)
pw.attach(base, pw.Adapter.load("{HERE}"), name="tuned", trainable=False)
tokenizer = base.tokenizer
{_prompt(receipt, whole=False)}
request = pw.Request(tuple(prompt), max_new_tokens=128, stop_ids={_stops(receipt)}, adapter="tuned")
print(tokenizer.decode(pw.generate(base, [request])[0].ids))
"""
    theirs = f"""
{_loaded(base)}
model = PeftModel.from_pretrained(model, "{HERE}")
{_prompt(receipt, whole=False)}
{_generated(receipt)}
"""
    return [
        "With Pennyweight:",
        _code("python", ours),
        "With PEFT and transformers:",
        _code("python", theirs),
        *_vllm(receipt),
    ]


def whole_usage(receipt: Mapping[str, Any]) -> list[str]:
    """Paragraphs and code blocks for the card of a whole model."""
    if "method" not in receipt:  # an adapter without a run: nothing is known of its rendering
        prompt = 'prompt = tokenizer("Your question")["input_ids"]'
        generated = _GENERATE.format(stops="")
    else:
        prompt, generated = _prompt(receipt, whole=True), _generated(receipt)
    theirs = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{HERE}")
model = AutoModelForCausalLM.from_pretrained("{HERE}", dtype="auto")
{prompt}
{generated}
"""
    return [
        "With transformers:",
        _code("python", theirs),
        "With vLLM:",
        _code("", f"vllm serve {HERE}"),
        f"As the base of another run, `base.model: {HERE}`.",
    ]


def _vllm(receipt: Mapping[str, Any]) -> list[str]:
    adapter, base = receipt["adapter"], receipt["base"]
    rank = next((rank for rank in VLLM_RANKS if rank >= adapter["r"]), None)
    merge = _code("", f"pennyweight merge {HERE} --out merged\nvllm serve merged")
    targets = adapter["target_modules"]
    head = not isinstance(targets, str) and any("lm_head" in name for name in targets)
    if rank is None or head or adapter["patterned"] or adapter["trained_whole"]:
        return ["With vLLM, which does not take this adapter as it is, merge it first:", merge]
    direct = _code(
        "",
        f"vllm serve {shlex.quote(_base_name(base))} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules tuned={HERE}",
    )
    if base["quantization"] == "none":
        return ["With vLLM:", direct]
    return [
        f"With vLLM. It holds the base in 16 bits, which is not what the adapter was trained beside "
        f"({base['quantization']}); `pennyweight merge` measures what that costs, and writes the closer "
        "model:",
        merge,
        "or, with the difference accepted:",
        direct,
    ]


def _base_name(base: Mapping[str, Any]) -> str:
    """What to write for the base: its Hub id, or a place to fill in."""
    named: str = base["hub_id"] or base["model"]
    return named if base["hub_id"] or named == "builtin" else f"path/to/{named}"


def _loaded(base: Mapping[str, Any]) -> str:
    """The base in transformers, quantized as it was in training."""
    imports = "AutoModelForCausalLM, AutoTokenizer"
    options = f"dtype=torch.{base['dtype']}"
    before = ""
    if base["quantization"] == "int8":
        before = "quantized = BitsAndBytesConfig(load_in_8bit=True)\n"
    elif base["quantization"] != "none":
        before = (
            "quantized = BitsAndBytesConfig(\n"
            f'    load_in_4bit=True,\n    bnb_4bit_quant_type="{base["quantization"]}",\n'
            f"    bnb_4bit_use_double_quant={base['double_quantization']},\n"
            f"    bnb_4bit_compute_dtype=torch.{base['dtype']},\n)\n"
        )
    if before:
        imports += ", BitsAndBytesConfig"
        options += ", quantization_config=quantized"
    name = f"base = {json.dumps(_base_name(base))}"
    if base["model"] == "builtin":
        name = "from pennyweight.builtin import model_folder\n\nbase = model_folder()"
    return (
        f"import torch\nfrom peft import PeftModel\nfrom transformers import {imports}\n"
        f"{name}\n{before}tokenizer = AutoTokenizer.from_pretrained(base)\n"
        f"model = AutoModelForCausalLM.from_pretrained(base, {options})"
    )


def _prompt(receipt: Mapping[str, Any], *, whole: bool) -> str:
    """Lines that make `prompt`, the ids that training saw before an answer.

    Where the tokenizer's own template does not give them, one that does stands in the folder; a
    `whole` model's tokenizer finds it by itself.
    """
    lines = [
        'chat = [{"role": "user", "content": "Your question"}]',
        "prompt = tokenizer.apply_chat_template(",
        "    chat, add_generation_prompt=True, return_dict=False",
        ")",
    ]
    if receipt["data"]["rendering"].get("exported") and not whole:
        read = f'with open("{HERE}/{EXPORTED}", encoding="utf-8") as file:'
        lines = [read, "    tokenizer.chat_template = file.read()", *lines]
    return "\n".join(lines)


_GENERATE = """ids = model.generate(torch.tensor([prompt], device=model.device), max_new_tokens=128{stops})
print(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))"""


def _generated(receipt: Mapping[str, Any]) -> str:
    return _GENERATE.format(stops=f", eos_token_id={list(_stops(receipt))}")


def _stops(receipt: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(receipt["data"]["rendering"]["stop_ids"])


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"
