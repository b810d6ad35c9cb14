"""A base's quantized weights from one start to the next: the same bits, or made again and told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pennyweight import doctor
from pennyweight.config import BaseConfig
from pennyweight.errors import ModelError
from pennyweight.model import BaseModel, cache, load_base, storage
from pennyweight.model.storage import quantized_layers


@pytest.fixture(autouse=True)
def bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(cache.LIMIT, "1")
    monkeypatch.setattr(cache, "_LEAST_BYTES", 0)
    return tmp_path / "cache" / "bases"


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that were quantized since."""
    shapes: list[tuple[int, ...]] = []
    plain = storage.quantize_4bit

    def watched(weight: torch.Tensor, **how: Any) -> Any:
        shapes.append(tuple(weight.shape))
        return plain(weight, **how)

    monkeypatch.setattr(storage, "quantize_4bit", watched)
    return shapes


def loaded(folder: Path, **how: Any) -> BaseModel:
    return load_base(BaseConfig(model=str(folder), device="cpu", **how))


def logits(base: BaseModel) -> torch.Tensor:
    ids, positions = torch.arange(5, 12), torch.arange(7)
    with torch.inference_mode(), base.route.over((0, 7), (None,)):
        return base.logits(base.hidden(ids, positions))


def assert_same(one: BaseModel, other: BaseModel) -> None:
    ours, theirs = quantized_layers(one.module), quantized_layers(other.module)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert (value.shape, value.dtype, value.format) == (
            theirs[name].shape,
            theirs[name].dtype,
            theirs[name].format,
        )
        for part, tensor in value.tensors().items():
            assert torch.equal(tensor, theirs[name].tensors()[part]), (name, part)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("double", [True, False])
def test_the_second_start_quantizes_nothing_and_has_the_same_bits(
    family: str, double: bool, tiny_model_folder: Any, quantized: list[Any], bases: Path
) -> None:
    folder = tiny_model_folder(family)
    first = loaded(folder, double_quantization=double)
    assert len(quantized) == len(quantized_layers(first.module)) > 0
    (entry,) = bases.iterdir()
    quantized.clear()
    second = loaded(folder, double_quantization=double)
    assert quantized == []
    assert_same(first, second)
    assert entry in cache.kept_bases()


def test_what_was_kept_is_mapped_and_never_copied(
    tiny_model_folder: Any, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers copies its configs, which carry the values through its loader."""
    loaded(tiny_model_folder("llama"))
    read: dict[str, Any] = {}
    plain = cache.KeptBase.read

    def watched(kept: Any) -> Any:
        read.update(plain(kept))
        return read

    monkeypatch.setattr(cache.KeptBase, "read", watched)
    again = quantized_layers(loaded(tiny_model_folder("llama")).module)
    assert read
    ours = {value.codes.data_ptr() for value in again.values()}
    assert ours == {value.codes.data_ptr() for value in read.values()}


def test_other_weights_or_storage_are_another_entry(
    tiny_model_folder: Any, quantized: list[Any], bases: Path
) -> None:
    folder = tiny_model_folder("llama")
    loaded(folder)
    loaded(folder, quantization="fp4")
    loaded(folder, double_quantization=False)
    assert len(list(bases.iterdir())) == 3
    quantized.clear()
    loaded(folder, quantization="int8")
    loaded(folder, quantization="none")
    assert quantized == []
    assert len(list(bases.iterdir())) == 3


def spoiled(entry: Path, how: str) -> None:
    weights, manifest = entry / "model.safetensors", entry / "manifest.json"
    if how == "a byte":
        with weights.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 255]))
    elif how == "cut":
        os.truncate(weights, weights.stat().st_size // 2)
    elif how == "no manifest":
        manifest.unlink()
    else:
        told = json.loads(manifest.read_text())
        told["made_from"]["fingerprint"] = "another"
        manifest.write_text(json.dumps(told))


@pytest.mark.parametrize("how", ["a byte", "cut", "no manifest", "another base"])
def test_a_damaged_entry_is_told_and_made_again(
    how: str, tiny_model_folder: Any, quantized: list[Any], bases: Path
) -> None:
    folder = tiny_model_folder("llama")
    first = loaded(folder)
    (entry,) = bases.iterdir()
    spoiled(entry, how)
    quantized.clear()
    with pytest.warns(UserWarning, match="damaged"):
        second = loaded(folder)
    assert quantized
    assert_same(first, second)
    quantized.clear()
    assert_same(first, loaded(folder))
    assert quantized == []


def test_weights_under_other_names_are_read_as_ever(
    tiny_model_folder: Any, quantized: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_folder("llama")
    first = loaded(folder)
    quantized.clear()
    read = cache.KeptBase.read
    monkeypatch.setattr(
        cache.KeptBase, "read", lambda self: {f"x{key}": each for key, each in read(self).items()}
    )
    assert_same(first, loaded(folder))
    assert quantized


def test_it_is_off_by_word_and_bounded(
    tiny_model_folder: Any, quantized: list[Any], bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_folder("llama")
    monkeypatch.setenv(cache.LIMIT, "off")
    loaded(folder)
    assert not bases.exists()
    monkeypatch.setenv(cache.LIMIT, "1e-6")
    loaded(folder)
    assert not bases.exists()
    monkeypatch.setenv(cache.LIMIT, "many")
    with pytest.raises(ModelError, match="many"):
        loaded(folder)


def test_the_entry_used_longest_ago_makes_room(
    tiny_model_folder: Any, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_folder("llama")
    loaded(folder)
    loaded(folder, quantization="fp4")
    first, second = cache.kept_bases()
    os.utime(first / "manifest.json")
    size = max(cache.kept_bases().values())
    monkeypatch.setenv(cache.LIMIT, f"{2.1 * size / 1e9:.9f}")
    loaded(folder, double_quantization=False)
    left = set(cache.kept_bases())
    assert first in left
    assert second not in left
    assert len(left) == 2
    assert sorted(path.name for path in bases.iterdir()) == sorted(path.name for path in left)


def test_a_cache_that_cannot_be_written_stops_no_run(
    tiny_model_folder: Any, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_safetensors", full)
    assert loaded(tiny_model_folder("llama")).quantization == "nf4"
    assert list(bases.iterdir()) == []


def test_the_doctor_says_what_is_kept(tiny_model_folder: Any, bases: Path) -> None:
    loaded(tiny_model_folder("llama"))
    (check,) = [check for check in doctor.doctor() if check.name == "quantized bases"]
    assert f"1 in {bases}" in check.found
    assert cache.LIMIT in check.mend
