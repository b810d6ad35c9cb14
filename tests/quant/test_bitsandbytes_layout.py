from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pennyweight.errors import ModelError
from pennyweight.quant import (
    Quantized4Bit,
    Quantized8Bit,
    dequantize_4bit,
    dequantize_8bit,
    from_bitsandbytes,
    quantize_4bit,
    quantize_8bit,
    to_bitsandbytes,
)

STATE = "weight.quant_state.bitsandbytes__nf4"
MODELS = ("stories260k-bnb-nf4", "stories260k-bnb-nf4-dq")


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(2, 90)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["nf4", "fp4"]),
    double_quantization=st.booleans(),
)
def test_written_bytes_are_those_bitsandbytes_writes(
    bnb: ModuleType, shape: Any, dtype: Any, kind: Any, double_quantization: bool
) -> None:
    weight = torch.randn(shape).to(dtype)
    q = quantize_4bit(weight, format=kind, double_quantization=double_quantization)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=double_quantization
    )
    theirs = {f"up.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    same_tensors(q.to_bitsandbytes("up"), {"up.weight": codes, **theirs})


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.layers.0.up", "model.layers.0.up."])
def test_writing_and_reading_are_inverse(kind: Any, double_quantization: bool, prefix: str) -> None:
    q = quantize_4bit(torch.randn(7, 39), format=kind, double_quantization=double_quantization)
    read = from_bitsandbytes(to_bitsandbytes(q, prefix), prefix)
    assert isinstance(read, Quantized4Bit)
    assert (read.shape, read.dtype, read.format) == (q.shape, q.dtype, q.format)
    assert torch.equal(dequantize_4bit(read), dequantize_4bit(q))
    same_tensors(read.tensors(), q.tensors())


def test_int8_writing_and_reading_are_inverse() -> None:
    q = quantize_8bit(torch.randn(6, 40).half())
    tensors = q.to_bitsandbytes("down")
    assert set(tensors) == {"down.weight", "down.SCB", "down.weight_format"}
    read = from_bitsandbytes({**tensors, "down.bias": torch.zeros(6)}, "down")
    assert isinstance(read, Quantized8Bit)
    assert torch.equal(dequantize_8bit(read), dequantize_8bit(q))


def test_a_state_dict_of_linear8bitlt_is_read() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle, is not installed")
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(40, 6, has_fp16_weights=False)
    weight = layer.weight.data.half().clone()
    layer.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    read = from_bitsandbytes(layer.to("cpu").state_dict())
    assert isinstance(read, Quantized8Bit)
    assert torch.equal(read.codes, quantize_8bit(weight).codes)


def test_codes_stored_under_another_dtype_are_read() -> None:
    """`bnb_4bit_quant_storage` names how the bytes are typed; FSDP recipes use bfloat16."""
    q = quantize_4bit(torch.randn(8, 32))
    tensors = q.to_bitsandbytes()
    tensors["weight"] = tensors["weight"].view(-1).view(torch.bfloat16).unsqueeze(1)
    read = from_bitsandbytes(tensors)
    assert isinstance(read, Quantized4Bit)
    assert torch.equal(read.codes, q.codes)


@pytest.mark.parametrize("model", MODELS)
def test_a_real_folder_is_read_as_bitsandbytes_reads_it(
    bnb: ModuleType, shared_data: Path, model: str
) -> None:
    file = shared_data / "models" / model / "model.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}")
    tensors = load_file(file)
    layers = [name.removesuffix(".weight.absmax") for name in tensors if name.endswith(".absmax")]
    layers = [name for name in layers if not name.endswith("nested")]
    assert len(layers) > 30
    for layer in layers:
        read = from_bitsandbytes(tensors, layer)
        assert isinstance(read, Quantized4Bit)
        own = {k: t for k, t in tensors.items() if k.startswith(f"{layer}.weight")}
        codes = own.pop(f"{layer}.weight")
        state = bnb.QuantState.from_dict(dict(own), device="cpu")
        assert torch.equal(dequantize_4bit(read), bnb.dequantize_4bit(codes, state))
        same_tensors(read.to_bitsandbytes(layer), {f"{layer}.weight": codes, **own})


def test_what_is_written_survives_a_safetensors_file(tmp_path: Path) -> None:
    q = quantize_4bit(torch.randn(300, 64))
    save_file(q.to_bitsandbytes("up"), tmp_path / "model.safetensors")
    read = from_bitsandbytes(load_file(tmp_path / "model.safetensors"), "up")
    assert isinstance(read, Quantized4Bit)
    same_tensors(read.tensors(), q.tensors())


def packed(**changes: Any) -> Tensor:
    state = json.loads(bytes(quantize_4bit(torch.randn(8, 16)).to_bitsandbytes()[STATE].tolist()))
    text = json.dumps({k: v for k, v in {**state, **changes}.items() if v is not ...})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no state": ({STATE: None}, "needs one of"),
    "unknown type": (
        {STATE: None, "weight.quant_state.bitsandbytes__af4": packed()},
        "found weight.quant_state.bitsandbytes__af4",
    ),
    "state of another type": ({STATE: packed(quant_type="fp4")}, 'quant_type is "fp4"'),
    "state is not JSON": ({STATE: torch.tensor([123, 255], dtype=torch.uint8)}, "not JSON"),
    "state is a list": ({STATE: torch.tensor(list(b"[]"), dtype=torch.uint8)}, "not a JSON object"),
    "block size": ({STATE: packed(blocksize=65)}, "blocksize is 65"),
    "dtype": ({STATE: packed(dtype="float8")}, 'dtype is "float8"'),
    "shape": ({STATE: packed(shape=[8, -16])}, r"shape is \[8, -16\]"),
    "shape missing": ({STATE: packed(shape=...)}, "shape is null"),
    "offset": ({STATE: packed(nested_offset=float("nan"))}, "nested_offset is NaN"),
    "unknown entry": ({STATE: packed(zero_point=1)}, "unknown entry 'zero_point'"),
    "too few codes": ({"weight": torch.zeros(63, 1, dtype=torch.uint8)}, "not 64 bytes of codes"),
    "no codes": ({"weight": None}, "weight: missing"),
    "too many scales": ({"weight.absmax": torch.zeros(3, dtype=torch.uint8)}, "not 2 bytes"),
    "plain scales under a nested state": ({"weight.absmax": torch.zeros(2)}, "float32"),
    "scale not finite": ({"weight.nested_absmax": torch.tensor([torch.inf])}, "inf at 0"),
    "scale below zero": ({"weight.nested_absmax": torch.tensor([-1.0])}, "negative"),
    "other levels": ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "levels are not those"),
    "other nested levels": ({"weight.nested_quant_map": torch.zeros(256)}, "are not those"),
    "unknown tensor": ({"weight.zeros": torch.zeros(2)}, "weight.zeros: not part of this layout"),
    "int8 mixed in": ({"SCB": torch.zeros(8)}, "not int8"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_layouts_are_refused(fault: str) -> None:
    changes, message = BROKEN[fault]
    tensors: dict[str, Any] = {**quantize_4bit(torch.randn(8, 16)).to_bitsandbytes(), **changes}
    tensors = {f"up.{name}": t for name, t in tensors.items() if t is not None}
    with pytest.raises(ModelError, match=message) as refusal:
        from_bitsandbytes(tensors, "up")
    assert all(line.startswith("up.") for line in str(refusal.value).splitlines())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SCB": torch.tensor([1.0, torch.nan, 1.0])}, "nan at 1"),
        ({"SCB": torch.ones(4)}, "not 3 float32 scales"),
        ({"weight": torch.zeros(3, 5, dtype=torch.uint8)}, "not int8"),
        ({"weight": torch.tensor(3, dtype=torch.int8)}, "not int8"),
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, "row-major"),
        ({"weight.absmax": torch.zeros(1)}, "not part of this layout"),
    ],
)
def test_broken_int8_layouts_are_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_bitsandbytes({**quantize_8bit(torch.randn(3, 5)).to_bitsandbytes(), **changes})


def test_all_faults_are_named_at_once() -> None:
    tensors = quantize_4bit(torch.randn(8, 16)).to_bitsandbytes()
    tensors["weight"] = torch.zeros(3, 1, dtype=torch.uint8)
    tensors["weight.quant_map"] = torch.zeros(15)
    tensors["weight.nested_absmax"] = torch.tensor([torch.nan])
    tensors["weight.extra"] = torch.zeros(1)
    with pytest.raises(ModelError) as refusal:
        from_bitsandbytes(tensors)
    assert len(str(refusal.value).splitlines()) == 4


def test_a_table_from_another_processor_is_accepted() -> None:
    tensors = quantize_4bit(torch.randn(8, 16)).to_bitsandbytes()
    table = tensors["weight.nested_quant_map"]
    tensors["weight.nested_quant_map"] = table.nextafter(torch.tensor(9.0)).where(table != 0, table)
    assert isinstance(from_bitsandbytes(tensors), Quantized4Bit)
