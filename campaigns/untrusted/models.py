"""Model folders that ask for code, for absurd memory or for files elsewhere: refused by load and plan."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from campaigns.small_run import build_model
from campaigns.tally import Tally
from campaigns.untrusted.watch import CANARY, judged
from pennyweight.config import BaseConfig, RunConfig
from pennyweight.model import load_base
from pennyweight.plan.outline import shapes_of

__all__ = ["run"]

LIMIT_S, RANDOM = 5.0, 80
CODE = f"import os\nos.environ[{CANARY!r}] = '1'\n"
Damage = Callable[[Path], object]


def run(tally: Tally, cases: int | None) -> None:
    good = build_model(tally.folder / "good")
    everything = list(_cases())
    chosen = everything if cases is None else everything[:: max(1, len(everything) // cases)]
    longest = 0.0
    for number, (label, damage, may_pass) in enumerate(chosen):
        folder = tally.folder / f"case-{number}"
        shutil.copytree(good, folder)
        (folder / "modeling.py").write_text(CODE)
        damage(folder)
        for verb, act in (("load", _load), ("plan", _plan)):
            passes = may_pass or verb == "plan"  # plan reads no weight
            fault, took = judged(
                lambda f=folder, a=act: a(f), folder, limit_s=LIMIT_S, may_pass=passes
            )
            longest = max(longest, took)
            tally.case(f"{verb}: {label}", fault)
        shutil.rmtree(folder, ignore_errors=True)
    tally.remark(f"longest {longest:.2f} s")


def _load(folder: Path) -> object:
    return load_base(BaseConfig(model=str(folder), quantization="nf4", device="cpu"))


def _plan(folder: Path) -> object:
    return shapes_of(RunConfig(base={"model": str(folder)}).base.model)


def _json(name: str, **fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def _put(name: str, content: str | bytes) -> Damage:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def _tokenizer(**fields: Any) -> Damage:
    return _json("tokenizer.json", **fields)


class _Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (CODE,)


def _cases() -> Iterator[tuple[str, Damage, bool]]:
    c = "config.json"
    auto = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}
    yield "auto_map", _json(c, auto_map=auto), False
    yield "auto_map inside", _json(c, text_config={"auto_map": auto}), False
    yield "trust_remote_code", _json(c, trust_remote_code=True), False
    for key in ("_attn_implementation", "attn_implementation", "_experts_implementation"):
        yield key, _json(c, **{key: "someone/kernel:run"}), False
    yield "an unknown type with code", _json(c, model_type="mine", auto_map=auto), False
    for key in ("to_dict", "get_text_config", "from_pretrained", "save_pretrained"):
        yield f"{key} is a setting", _json(c, **{key: "x"}), False
    for value in (
        {"quant_method": "gptq"},
        {"quant_method": "../x"},
        {"quant_method": 5},
        5,
        [],
        "x",
    ):
        yield f"quantization_config {value}", _json(c, quantization_config=value), False
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
             "num_key_value_heads", "max_position_embeddings", "head_dim")  # fmt: skip
    for key in sizes:
        for value in (10**12, 10**30, -1, 0, 1.5, "8", True, [], {}, 1e308):
            yield f"{key} = {value}", _json(c, **{key: value}), False
    yield "more weights than are stored", _json(c, hidden_size=2048, intermediate_size=8192), False
    yield "more layers than are stored", _json(c, num_hidden_layers=1500), False
    yield "a type that needs other settings", _json(c, model_type="gpt2"), False
    yield "a type that is no language model", _json(c, model_type="vit"), False
    for text in ("", "[", "[]", "null", "[" * 99_999, '{"a": NaN}', '{"a": 1, "a": 2}', "\xff\xfe"):
        yield f"config {text[:12]!r}", _put(c, text), False
    yield "config of 40 MB", _put(c, b'{"a": "' + b"a" * 40_000_000 + b'"}'), False
    yield from _files()
    yield from _tokenizers()
    dice = random.Random(0)
    for number in range(RANDOM):
        yield f"at random {number}", _at_random(dice.randrange(2**32)), True


def _files() -> Iterator[tuple[str, Damage, bool]]:
    weights, index = "model.safetensors", "model.safetensors.index.json"
    for name in ("../good/model.safetensors", "/etc/passwd", "pytorch_model.bin", "a/b.safetensors",
                 "..\\x.safetensors", "", ".safetensors", "model.safetensors\0", "gone.safetensors", 5, None, ["a"]):  # fmt: skip
        text = json.dumps({"weight_map": {"w": name}})
        yield f"the index names {name!r}", _put(index, text), False
    for text in ("", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {}}', "[" * 99_999):
        yield f"index {text[:18]!r}", _put(index, text), False
    for place in ("../good/model.safetensors", "/etc/passwd", "/dev/zero"):
        yield (
            f"weights a link to {place}",
            lambda f, p=place: ((f / weights).unlink(), (f / weights).symlink_to(p)),
            False,
        )
        yield (
            f"config a link to {place}",
            lambda f, p=place: ((f / "config.json").unlink(), (f / "config.json").symlink_to(p)),
            False,
        )
    planted = pickle.dumps(_Planted())
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        yield (
            f"only a pickle {name}",
            lambda f, n=name: ((f / weights).unlink(), (f / n).write_bytes(planted)),
            False,
        )
        yield f"a pickle {name} beside", _put(name, planted), True
    yield "a pickle as weights", _put(weights, planted), False
    for size in (0, 2**40, 2**64 - 1):
        yield f"a header of {size:,}", lambda f, s=size: _rewrite(f / weights, s), False
    yield "cut off", lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-9]), False
    yield "a weight missing", lambda f: _weights(f, lambda t: dict(list(t.items())[1:])), False
    yield (
        "a weight of another shape",
        lambda f: _weights(f, lambda t: {k: v[:1].clone() for k, v in t.items()}),
        False,
    )
    yield "a zip", lambda f: (shutil.make_archive(str(f), "zip", f), shutil.rmtree(f)), False


def _rewrite(path: Path, size: int) -> None:
    path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])


def _weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def _tokenizers() -> Iterator[tuple[str, Damage, bool]]:
    t = "tokenizer_config.json"
    yield "tokenizer auto_map", _json(t, auto_map={"AutoTokenizer": ["modeling.T", None]}), False
    yield "init_inputs", _json(t, init_inputs=["/etc/passwd"]), False
    for key in ("tokenizer_file", "vocab_file", "special_tokens_map_file"):
        yield f"{key} elsewhere", _json(t, **{key: "/etc/passwd"}), False
        yield f"{key} nowhere", _json(t, **{key: "/nowhere/of/its/author"}), True
    for value in (5, [], {"a": 1}, "os.system", "../x"):
        yield f"tokenizer_class {value}", _json(t, tokenizer_class=value), True
        yield f"eos_token {value}", _json(t, eos_token=value), True
        yield f"chat_template {value}", _json(t, chat_template=value), True
    for text in ("", "[]", "{}", "[" * 99_999, '{"model": {"type": "BPE"}}', '{"version": 5}'):
        yield f"tokenizer {text[:18]!r}", _put("tokenizer.json", text), False
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    swelling = {"type": "Sequence", "normalizers": [doubling] * 60}
    yield "a normalizer that swells", _tokenizer(normalizer=swelling), False
    bomb = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+b"},
        "behavior": "Isolated",
        "invert": False,
    }
    yield "an expression that hangs", _tokenizer(pre_tokenizer=bomb), True
    far = [{"id": 2**31, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}]  # fmt: skip
    yield "a token with a far id", _tokenizer(added_tokens=far), False
    for value in ("x", [1.5], -1, 2**40, {"a": 1}):
        yield (
            f"generation eos {value}",
            _put("generation_config.json", json.dumps({"eos_token_id": value})),
            False,
        )


def _at_random(seed: int) -> Damage:
    """Two settings of a file replaced by something of another kind."""

    def damage(folder: Path) -> None:
        dice = random.Random(seed)
        path = folder / dice.choice(["config.json", "tokenizer_config.json", "tokenizer.json"])
        found = json.loads(path.read_text())
        for key in dice.sample(sorted(found), 2):
            found[key] = dice.choice([None, True, 0, -1, 2.5, "", "x", [], [None], {}, {"a": [1]}])
        path.write_text(json.dumps(found))

    return damage
