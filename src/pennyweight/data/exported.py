"""A surface as a chat template for transformers: what is done around a template here, in Jinja.

`apply_chat_template` adds no BOS, folds no system message and knows no default system message; the
template that stands in a merged folder has to do it all itself, or whoever asks the merged model
asks it with other ids than it was trained on.
"""

from __future__ import annotations

from pennyweight.data.codec import Codec
from pennyweight.data.conversation import Message
from pennyweight.data.surface import Plain, Surface

__all__ = ["exported"]

_PROBE = (Message("user", "question 7341"),)
# Each ends with a block at the end of a line, so that what follows begins one: the line end goes.
_BOS = "{% if true %}{{ bos_token }}{% endif %}\n"
_FOLD = (
    "{% if messages | length > 1 and messages[0]['role'] == 'system' %}"
    "{% set messages = [dict(messages[1], content=messages[0]['content'] + '\\n\\n'"
    " + messages[1]['content'])] + messages[2:] %}{% endif %}\n"
)
_SYSTEM = (
    "{% if not messages | selectattr('role', 'in', ['system', 'developer']) | list %}"
    "{% set messages = [{'role': 'system', 'content': SYSTEM}] + messages %}{% endif %}\n"
)
_PARTS = (
    "{% set as_parts = namespace(rows=[]) %}{% for message in messages %}"
    "{% if message['content'] is string %}{% set as_parts.rows = as_parts.rows + "
    "[dict(message, content=[{'type': 'text', 'text': message['content']}])] %}"
    "{% else %}{% set as_parts.rows = as_parts.rows + [message] %}{% endif %}{% endfor %}"
    "{% set messages = as_parts.rows %}\n"
)
_PLAIN_BOS = "{% if not messages[0]['content'].startswith(bos_token) %}{{ bos_token }}{% endif %}\n"
_PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ STOP }}"
    "{% elif (loop.last and add_generation_prompt)"
    " or (not loop.last and loop.nextitem['role'] == 'assistant') %}{{ SUFFIX }}"
    "{% else %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)


def exported(surface: Surface, codec: Codec, *, system: str | None) -> str | None:
    """The Jinja source, or None where the tokenizer's own template gives the same by itself."""
    before = "" if system is None else _SYSTEM.replace("SYSTEM", _literal(system))
    if isinstance(surface, Plain):
        body = _PLAIN.replace("STOP", _literal(surface.stop_text))
        bos = _PLAIN_BOS if surface.adds_bos else ""
        return before + bos + body.replace("SUFFIX", _literal(surface.suffix))
    if surface.adds_bos and not _prints_bos(surface, codec):
        before += _BOS
    if surface.folds_system:
        before += _FOLD
    if surface.content_is_parts:
        before += _PARTS
    for name, value in surface.switches.items():
        before += f"{{% if {name} is not defined %}}{{% set {name} = {str(value).lower()} %}}"
        before += "{% endif %}\n"
    if surface.eos_text is not None:
        before += f"{{% set eos_token = {_literal(surface.eos_text)} %}}\n"
    if not before and surface.name == "tokenizer":
        return None
    default = surface.sources.get("default") or next(iter(surface.sources.values()))
    if "tool_use" not in surface.sources:
        return before + default
    with_tools = surface.sources["tool_use"]
    return f"{before}{{% if tools %}}\n{with_tools}{{% else %}}\n{default}{{% endif %}}"


def _prints_bos(surface: Surface, codec: Codec) -> bool:
    return codec.ids(surface.text(_PROBE, None, generation=True))[:1] == [codec.bos_id]


def _literal(text: str) -> str:
    """Text as a Jinja string; Jinja reads Python's escapes."""
    escaped = text.encode("unicode_escape").decode("ascii")
    return '"' + escaped.replace('"', "\\x22") + '"'
