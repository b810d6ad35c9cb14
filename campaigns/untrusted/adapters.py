"""Over 200 adapters that are damaged, absurd or meant to harm, generated from one good one."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file

from campaigns.small_run import build_model
from campaigns.tally import Tally
from campaigns.untrusted.watch import CANARY, judged
from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.lora import Adapter, adapter_of, attach, described, detach
from pennyweight.model import load_base

__all__ = ["run"]

LIMIT_S = 1.0
FLIPS, CUTS = 60, 30
SETTINGS, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "pennyweight.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Case:
    """`damage` changes a good adapter's folder; `may_load` where what is left is legal."""

    label: str
    damage: Callable[[Path], object]
    may_load: bool = False


def run(tally: Tally, cases: int | None) -> None:
    base, good = _prepared(tally.folder)
    everything = list(_cases())
    chosen = everything if cases is None else everything[:: max(1, len(everything) // cases)]
    longest = 0.0
    for number, case in enumerate(chosen):
        folder = tally.folder / f"case-{number}"
        shutil.copytree(good, folder)
        case.damage(folder)

        def act(folder: Path = folder) -> None:
            attach(base, Adapter.load(folder), name="a")
            detach(base, "a")

        fault, took = judged(act, folder, limit_s=LIMIT_S, may_pass=case.may_load)
        longest = max(longest, took)
        tally.case(case.label, fault)
        shutil.rmtree(folder, ignore_errors=True)
    tally.remark(f"longest {longest:.2f} s")


def _prepared(folder: Path) -> tuple[Any, Path]:
    build_model(folder / "model")
    base = load_base(BaseConfig(model=str(folder / "model"), quantization="none", device="cpu"))
    config = LoraConfig(r=2, target_modules=("q_proj", "v_proj"))
    attach(base, config, name="good")
    good = described(adapter_of(base, "good", config), base).save(folder / "good")
    detach(base, "good")
    return base, good


def _settings(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / SETTINGS
        found = {k: v for k, v in json.loads(path.read_text()).items() if k not in fields}
        path.write_text(json.dumps(found | fields))

    return damage


def _text(name: str, text: str | bytes) -> Callable[[Path], object]:
    raw = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(raw)


def _ours(**fields: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / OURS).write_text(
        json.dumps(json.loads((folder / OURS).read_text()) | fields)
    )


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = {k: v.clone() for k, v in load_file(folder / TENSORS).items()}
        save_file({k: v.contiguous() for k, v in change(tensors).items()}, folder / TENSORS)

    return damage


def _bytes(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], object]:
    return lambda folder: (folder / TENSORS).write_bytes(
        change(bytearray((folder / TENSORS).read_bytes()))
    )


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def rewritten(raw: bytearray) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + size :]

    return _bytes(rewritten)


class _Planted:
    """Unpickled, it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import os; os.environ[{CANARY!r}] = '1'",)


def _cases() -> Iterator[Case]:
    yield from _of_settings()
    yield from _of_our_settings()
    yield from _of_tensors()
    yield from _of_headers()
    yield from _of_folders()
    yield from _at_random()


WRONG_KINDS: tuple[Any, ...] = (
    None,
    True,
    7,
    -1,
    10**400,
    1e308,
    "x" * 5000,
    [],
    [1],
    {},
    {"a": 1},
)
BOMBS = ("(a+)+b", "(.*)*(.*)*(.*)*x", "((((a*)*)*)*)*b", "(" * 3000, "a{999999999}", "[", r"(a)\1")

# Matched in no time here, and they match nothing.
HARMLESS = (*BOMBS[:3], "a{999999999}")


def _of_settings() -> Iterator[Case]:
    for key in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
    ):
        for value in WRONG_KINDS:
            legal = value is None or (key, value) in [
                ("r", 7),
                ("lora_alpha", 7),
                ("lora_alpha", 10**400),
            ]
            legal = legal or (value in ({}, {"a": 1}) and "pattern" in key)
            yield Case(f"{key} = {str(value)[:20]}", _settings(**{key: value}), legal)
    for key in ("modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"):
        for value in (True, -1, {"a": 1}, [None], [["a"]], "x" * 5000, 10**40):
            may = key == "exclude_modules" and isinstance(value, str)
            yield Case(f"{key} = {str(value)[:20]}", _settings(**{key: value}), may)
    for key in ("peft_type", "bias", "use_dora", "fan_in_fan_out", "base_model_name_or_path"):
        for value in (5, [], {"a": "b"}, "../../../etc/passwd\0", "\x1b]0;owned\x07"):
            may = key in ("fan_in_fan_out", "base_model_name_or_path") and isinstance(
                value, str | list
            )
            yield Case(f"{key} = {value!r}", _settings(**{key: value}), may)
    for bomb in BOMBS:
        yield Case(f"target_modules {bomb[:20]}", _settings(target_modules=bomb))
        yield Case(f"rank_pattern {bomb[:20]}", _settings(rank_pattern={bomb: 2}), bomb in HARMLESS)
        yield Case(
            f"alpha_pattern {bomb[:20]}", _settings(alpha_pattern={bomb: 2}), bomb in HARMLESS
        )
        yield Case(f"exclude {bomb[:20]}", _settings(exclude_modules=bomb), bomb in HARMLESS)
        damage = _settings(layers_to_transform=[0, 1], layers_pattern=bomb)
        yield Case(f"layers_pattern {bomb[:20]}", damage, bomb in HARMLESS)
    yield Case("alpha by pattern", _settings(alpha_pattern={".*": 1e30}))
    yield Case("rank by pattern", _settings(rank_pattern={".*": 4096}))
    yield Case("a million patterns", _settings(rank_pattern={f"m{i}": 2 for i in range(200_000)}))
    yield Case("modules_to_save without weights", _settings(modules_to_save=["embed_tokens"]), True)
    yield Case("modules_to_save of paths", _settings(modules_to_save=["../../x", "/etc"]), True)
    code = {"base_model_class": "X", "parent_library": "antigravity"}
    yield Case("auto_mapping names a library", _settings(auto_mapping=code), True)
    yield Case("auto_map", _settings(auto_map={"AutoModel": "code.Model"}), True)
    for key in (
        "use_dora",
        "lora_bias",
        "layer_replication",
        "trainable_token_indices",
        "use_bdlora",
    ):
        yield Case(f"{key} changes the formula", _settings(**{key: [[0, 1]]}))
    for key in ("IA3", "ADALORA", "PROMPT_TUNING", "", None):
        yield Case(f"peft_type {key}", _settings(peft_type=key))
    for text in (
        "",
        "[",
        "null",
        "[]",
        '"a"',
        "{",
        "[" * 99_999,
        '{"a":' * 9_999,
        "\xff\xfe",
        "{}",
        "NaN",
    ):
        yield Case(f"settings {text[:12]!r}", _text(SETTINGS, text))
    for text in (
        '{"r": 2, "r": 3}',
        '{"r": NaN}',
        '{"a": "\\ud800"}',
        '{"r": 2e999}',
        '{"r": ' + "9" * 5000 + "}",
    ):
        yield Case(f"settings {text[:16]!r}", _text(SETTINGS, text))
    yield Case("settings not UTF-8", _text(SETTINGS, b'{"r": "\xff"}'))
    yield Case("settings of 40 MB", _text(SETTINGS, b'{"a": "' + b"a" * 40_000_000 + b'"}'))


def _of_our_settings() -> Iterator[Case]:
    for value in (5, "a", [], {"fingerprint": 5}, {"fingerprint": "../x"}, {"name": ["a"]}):
        yield Case(f"our base = {value}", _ours(base=value))
    yield Case("another base", _ours(base={"name": "other", "fingerprint": "0" * 64}))
    for value in ("a", -1, 10**400, [1], {}):
        yield Case(f"our ratio = {str(value)[:9]}", _ours(loraplus_lr_ratio=value), value == {})
    for value in ("q_proj", [5], {"a": 1}):
        yield Case(f"our names = {value}", _ours(target_names=value))
    yield Case("our narrowing", _ours(exclude_modules=5))
    yield Case("our file is a list", _text(OURS, "[]"))


def _of_tensors() -> Iterator[Case]:
    a, b = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
    for name, value in (("NaN", float("nan")), ("inf", float("inf")), ("-inf", float("-inf"))):
        for key in (a, b):
            for at in (0, -1):
                yield Case(
                    f"{name} at {at} of {key[-8]}",
                    _tensors(lambda t, k=key, v=value, i=at: t | {k: _with(t[k], i, v)}),
                )
    yield Case(
        "the product is past float32",
        _tensors(lambda t: {k: torch.full_like(v, 1e38) for k, v in t.items()}),
    )
    for shape in (
        (0,),
        (2,),
        (0, 32),
        (3, 32),
        (2, 5),
        (2, 32, 1),
        (1, 2, 32),
        (2, 64),
        (4096, 32),
        (2, 2**20),
    ):
        yield Case(f"A of shape {shape}", _tensors(lambda t, s=shape: t | {a: torch.zeros(s)}))
    for kind in (
        torch.int8,
        torch.int64,
        torch.bool,
        torch.uint8,
        torch.complex64,
        torch.float8_e4m3fn,
    ):
        yield Case(
            f"factors of {kind}", _tensors(lambda t, k=kind: {n: v.to(k) for n, v in t.items()})
        )
    yield Case("no tensors", _tensors(lambda t: {}))
    for gone in (a, b):
        yield Case(
            f"without {gone[-8]}",
            _tensors(lambda t, g=gone: {k: v for k, v in t.items() if k != g}),
        )
    yield Case("a module missing", _tensors(lambda t: {k: v for k, v in t.items() if Q not in k}))
    names = (
        "stray", "../../../tmp/owned", "/etc/passwd", "base_model.model..weight", "", "lora_A", "\x1b[2J",
        "base_model.model.__class__.weight", f"{Q}.lora_A.default.weight", f"{Q}.lora_C.weight",
        f"{Q}.lora_A.weight.weight", f"{Q}.lora_embedding_A", f"{Q}.lora_magnitude_vector.weight",
        "base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight", "x" * 100_000,
    )  # fmt: skip
    for name in names:
        yield Case(
            f"extra key {name[:40]!r}", _tensors(lambda t, n=name: t | {n: torch.zeros(2, 32)})
        )
    for old, new in (
        ("q_proj", "z_proj"),
        ("layers.0", "layers.7"),
        ("lora_A", "lora_X"),
        (".weight", ""),
        ("base_model.", ""),
    ):
        yield Case(
            f"{old} renamed {new}",
            _tensors(lambda t, o=old, n=new: {k.replace(o, n): v for k, v in t.items()}),
        )
    yield Case("A and B swapped", _tensors(lambda t: t | {a: t[b], b: t[a]}))
    yield Case(
        "a copy of what is no module",
        _tensors(lambda t: t | {"base_model.model.x.weight": torch.zeros(3)}),
    )
    copied = "base_model.model.model.embed_tokens.weight"
    yield Case("a copy of another shape", _tensors(lambda t: t | {copied: torch.zeros(3, 4)}))
    along = f"{Q}.base_layer.weight"
    yield Case("a base weight changed along", _tensors(lambda t: t | {along: torch.zeros(32, 32)}))


def _with(tensor: torch.Tensor, at: int, value: float) -> torch.Tensor:
    tensor.view(-1)[at] = value
    return tensor


def _of_headers() -> Iterator[Case]:
    a = f"{Q}.lora_A.weight"
    for size in (0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1):
        yield Case(
            f"a header of {size:,} bytes", _bytes(lambda r, s=size: s.to_bytes(8, "little") + r[8:])
        )
    for entry in (5, [], {}, {"dtype": "F32"}, None):
        yield Case(f"an entry {entry}", _header(lambda h, e=entry: h.update({a: e})))
    for field, values in {
        "dtype": ("F99", "", 5, None, [], "F64", "__import__"),
        "shape": ([2], [2, 33], [-2, -32], [2**62, 2**62], [2.0, 32], "ab", None, [0], [1] * 99),
        "data_offsets": (
            [0, 0],
            [0, 2**62],
            [-8, 8],
            [8, 4],
            [0],
            [0, 1, 2],
            ["0", "8"],
            None,
            [0, 255],
        ),
    }.items():
        for value in values:
            yield Case(
                f"{field} = {str(value)[:20]}",
                _header(lambda h, f=field, v=value: h[a].update({f: v})),
            )
    yield Case(
        "overlapping",
        _header(
            lambda h: (
                [e.update(data_offsets=[0, 256]) for k, e in h.items() if k[:2] != "__"] and None
            )
        ),
    )
    yield Case("the header a list", _header(lambda h: b"[]"))
    yield Case("the header deep", _header(lambda h: b"[" * 90_000))
    yield Case(
        "a key twice", _header(lambda h: json.dumps(h).encode().replace(b"q_proj", b"v_proj"))
    )
    yield Case("the header NaN", _header(lambda h: b'{"a": NaN}'))
    many = {f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    yield Case("100,000 empty tensors", _text(TENSORS, _packed(many)))
    hole = {a: {"dtype": "F32", "shape": [2, 2**40], "data_offsets": [0, 2**43]}}

    def sparse(folder: Path) -> None:
        with (folder / TENSORS).open("wb") as file:
            file.write(_packed(hole))
            file.truncate(file.tell() + 2**43)

    yield Case("8 TB of holes", sparse)


def _packed(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def _of_folders() -> Iterator[Case]:
    for name in (SETTINGS, TENSORS, OURS):
        yield Case(f"no {name}", lambda f, n=name: (f / n).unlink(), name == OURS)
        yield Case(f"{name} a folder", lambda f, n=name: ((f / n).unlink(), (f / n).mkdir()))
        for place in ("/etc/passwd", "/dev/zero", "../good/" + name, "/proc/self/environ", name):
            yield Case(
                f"{name} a link to {place[:12]}",
                lambda f, n=name, p=place: ((f / n).unlink(), (f / n).symlink_to(p)),
                name == OURS and place == name,
            )
        if hasattr(os, "mkfifo"):
            yield Case(f"{name} a pipe", lambda f, n=name: ((f / n).unlink(), os.mkfifo(f / n)))
    planted = pickle.dumps(_Planted())
    for name in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"):
        yield Case(
            f"a pickle {name}",
            lambda f, n=name: ((f / TENSORS).unlink(), (f / n).write_bytes(planted)),
        )
        yield Case(f"a pickle {name} beside", _text(name, planted), True)
    yield Case("a pickle as safetensors", _text(TENSORS, planted))
    yield Case("a pickle as settings", _text(SETTINGS, planted))
    yield Case("torch.save as safetensors", lambda f: torch.save({"a": torch.ones(2)}, f / TENSORS))
    yield Case(
        "code beside", _text("modeling.py", f"import os; os.environ[{CANARY!r}] = '1'"), True
    )
    yield Case("a zip as safetensors", lambda f: _zipped(f / TENSORS))
    yield Case("a tar as settings", lambda f: _tarred(f / SETTINGS))
    yield Case("the folder a zip", lambda f: (shutil.rmtree(f), _zipped(f)))
    yield Case("the folder a tar", lambda f: (shutil.rmtree(f), _tarred(f)))
    yield Case("no folder", shutil.rmtree)


def _zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../owned", "x")


def _tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("/tmp/owned")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))


def _at_random() -> Iterator[Case]:
    """A flipped bit of a weight is another finite weight, most often; then it is read."""
    dice = random.Random(0)
    for number in range(FLIPS):
        at, bit = dice.random(), dice.randrange(8)
        yield Case(f"bit flip {number}", _bytes(partial(_flipped, share=at, bit=bit)), True)
        if number % 2:
            flip = partial(_flipped, share=at * 0.05, bit=bit)
            yield Case(f"bit flip in the header {number}", _bytes(flip), True)
    for number in range(CUTS):
        share = dice.random()
        yield Case(f"cut off {number}", _bytes(partial(_cut, share=share)))
        yield Case(f"settings cut off {number}", partial(_settings_cut, share=share))
    yield Case("one byte more", _bytes(lambda r: r + b"\0"))
    yield Case("noise", _text(TENSORS, dice.randbytes(4096)))
    yield Case("empty", _text(TENSORS, b""))
    yield Case("another adapter's tensors", _text(TENSORS, save({"a": torch.ones(2)})))


def _flipped(raw: bytearray, share: float, bit: int) -> bytearray:
    raw[int(len(raw) * share)] ^= 1 << bit
    return raw


def _cut(raw: bytearray, share: float) -> bytearray:
    return raw[: int(len(raw) * share)]


def _settings_cut(folder: Path, share: float) -> None:
    text = (folder / SETTINGS).read_text().rstrip()
    (folder / SETTINGS).write_text(text[: int(len(text) * share)])
