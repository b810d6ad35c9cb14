"""Names that other tools have for chat templates, and what stands for them here."""

from __future__ import annotations

import re
from pathlib import Path

from pennyweight.config.foreign.account import Account
from pennyweight.config.foreign.rows import local_path

__all__ = ["template"]

# A word in a template's name, and what a model's name has where its tokenizer prints that template.
_FAMILIES = {
    "llama": r"llama",
    "qwen": r"qwen|qwq",
    "mistral": r"mistral|mixtral|ministral|nemo",
    "gemma": r"gemma",
    "phi": r"phi",
    "deepseek": r"deepseek",
    "cohere": r"command|cohere|aya",
    "exaone": r"exaone",
    "jamba": r"jamba",
    "glm": r"glm",
    "yi": r"(^|/)yi-",
    "falcon": r"falcon",
    "granite": r"granite",
    "stablelm": r"stablelm",
    "smollm": r"smollm",
    "olmo": r"olmo",
    "internlm": r"internlm",
    "minicpm": r"minicpm",
}
_OWN = {"tokenizer_default", "auto", "default_tokenizer"}


def template(account: Account, key: str, model: str, beside: Path) -> None:
    """`data.template` from a template's name; a Jinja text is written beside the run's YAML."""
    name, jinja = account.text(key), account.text("chat_template_jinja")
    if jinja and name in (None, "jinja"):
        _jinja(account, jinja, beside)
        if name:
            account.same(key, "the template that chat_template_jinja gives")
        return
    if name is None:
        return
    fallback = re.fullmatch(r"tokenizer_default_fallback_(\w+)", name)
    if name in _OWN:
        account.carry(key, "data.template", "auto", "the tokenizer's own template")
    elif fallback:
        account.carry(
            key,
            "data.template",
            "auto",
            f"the tokenizer's own; where it has none, {fallback[1]} there, a plain one here",
        )
    elif name == "chatml":
        account.carry(
            key,
            "data.template",
            "chatml",
            "the tokenizer must have <|im_end|>; it is not added here, else set auto",
        )
    elif _is_of(name, model):
        account.carry(
            key,
            "data.template",
            "auto",
            f"the tokenizer's own, which is {name}'s where the model is an instruct model; "
            "`pennyweight preview` shows it",
        )
    else:
        account.run["data.template"] = "auto"
        account.lose(
            key,
            f"{name}'s way to print turns; here the tokenizer's own template is used, or a plain "
            "one where it has none. Give a Jinja file as data.template for another",
        )


def _is_of(name: str, model: str) -> bool:
    return any(
        word in name.lower() and re.search(pattern, model.lower())
        for word, pattern in _FAMILIES.items()
    )


def _jinja(account: Account, text: str, beside: Path) -> None:
    if "{" not in text:
        path = local_path(text, beside)
        account.carry("chat_template_jinja", "data.template", path, "a Jinja file")
        return
    account.files["chat_template.jinja"] = text
    account.carry(
        "chat_template_jinja",
        "data.template",
        "chat_template.jinja",
        "the text is written to that file, beside the run's YAML",
    )
