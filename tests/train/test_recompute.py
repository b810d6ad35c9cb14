"""Every recompute policy gives the same gradients; what is kept goes where the policy says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pennyweight.blocks import HostEmbedding
from pennyweight.config import BaseConfig, LoraConfig, RunConfig, resolve
from pennyweight.data.batch import Batch
from pennyweight.errors import ConfigError, ModelError
from pennyweight.lora import attach, trained_parameters
from pennyweight.loss import summed_cross_entropy
from pennyweight.model import BaseModel, load_base
from pennyweight.train import disable_checkpointing, enable_checkpointing, saved_bytes
from pennyweight.train.recompute import HostStore

BatchOf = Callable[..., Batch]
POLICIES = [("none", None), ("minimal", None), ("full", None), ("offloaded", None), ("minimal", 1)]


def gradients(base: BaseModel, batch: Batch) -> list[Tensor]:
    learned = [p for p in base.module.parameters() if p.requires_grad]
    with base.route.over(batch.boundaries, batch.adapters, dropout_seed=5):
        hidden = base.hidden(batch.ids, batch.positions)
        total, _ = summed_cross_entropy(
            hidden, batch.ids, batch.trained, batch.boundaries, base.head
        )
        return [total.detach(), *torch.autograd.grad(total, learned)]


def adapted(folder: Path, **base: Any) -> BaseModel:
    """A base with an adapter that is far from fresh."""
    settings = {"quantization": "none", "device": "cpu", **base}
    made = load_base(BaseConfig(model=str(folder), **settings))
    attach(made, LoraConfig(r=2, lora_dropout=0.3))
    with torch.no_grad():
        for parameter in trained_parameters(made, "default").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "stablelm_12b", "gemma3", "gpt2"])
def test_every_policy_gives_the_same_gradients_to_the_bit(
    tiny_model_folder: Callable[[str], Path], batch_of: BatchOf, family: str
) -> None:
    base = adapted(tiny_model_folder(family))
    batch = batch_of(3, 9)
    usual = gradients(base, batch)
    for policy, layers in POLICIES:
        enable_checkpointing(base, policy, layers=layers)
        for one, two in zip(usual, gradients(base, batch), strict=True):
            assert torch.equal(one, two), (policy, layers)
    disable_checkpointing(base)
    assert not base.route.recomputing


def test_full_fine_tuning_too(tiny_llama_folder: Path, batch_of: BatchOf) -> None:
    base = load_base(
        BaseConfig(model=str(tiny_llama_folder), quantization="none", device="cpu"), trainable=True
    )
    batch = batch_of(3, 9)
    usual = gradients(base, batch)
    for policy, layers in POLICIES:
        enable_checkpointing(base, policy, layers=layers)
        for one, two in zip(usual, gradients(base, batch), strict=True):
            assert torch.equal(one, two), (policy, layers)


class Counted(TorchDispatchMode):
    """How often each operation really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def test_attention_is_not_run_again_by_minimal_nor_down_by_any(
    base: BaseModel, batch_of: BatchOf
) -> None:
    batch = batch_of(9)
    calls: dict[str, Counter[Any]] = {}
    for policy in ("none", "minimal", "full"):
        enable_checkpointing(base, policy)  # type: ignore[arg-type]
        with Counted() as counted:
            gradients(base, batch)
        calls[policy] = counted.calls
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert [calls[p][attention] for p in calls] == [2, 2, 4]
    layers, seven, updates = 2, 7, 7
    # A layer run again makes seven products and seven A x, less the product with `down_proj`.
    product = torch.ops.aten.mm.default
    assert calls["full"][product] - calls["none"][product] == layers * (seven - 1 + updates)
    assert calls["minimal"][product] == calls["full"][product]


def test_only_the_first_layers_go_by_the_policy(base: BaseModel, batch_of: BatchOf) -> None:
    batch = batch_of(9)

    def kept() -> int:
        with base.route.over(batch.boundaries, batch.adapters):
            return saved_bytes(
                lambda: base.hidden(batch.ids, batch.positions), besides=base.module.parameters()
            )

    sizes = [kept()]
    for layers in (1, 2):
        enable_checkpointing(base, "full", layers=layers)
        sizes.append(kept())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[1] == pytest.approx(sizes[1] - sizes[2], rel=0.2)
    enable_checkpointing(base, "full", layers=0)
    assert kept() == sizes[0]


def test_offloaded_inputs_wait_in_buffers_that_are_used_again(
    base: BaseModel, batch_of: BatchOf
) -> None:
    batch = batch_of(3, 9)
    store = HostStore(base.device, width=32)
    enable_checkpointing(base, "full")
    base.keeping = store.keeping
    first = gradients(base, batch)
    inputs = (2 + 1) * batch.tokens * 32 * 4  # of two layers and the last norm
    assert store.held_bytes == inputs
    assert sum(buffer.nbytes for free in store.free.values() for buffer in free) == inputs
    for one, two in zip(first, gradients(base, batch), strict=True):
        assert torch.equal(one, two)
    assert store.held_bytes == inputs
    with base.route.over(batch.boundaries, batch.adapters):
        left = saved_bytes(
            lambda: base.hidden(batch.ids, batch.positions), besides=base.module.parameters()
        )
    assert left < 3 * batch.tokens * 32 * 4  # nothing of the layers' width but what is on its way


def test_embeddings_stay_in_host_memory(tiny_llama_folder: Path, batch_of: BatchOf) -> None:
    base = adapted(tiny_llama_folder)
    beside = load_base(
        BaseConfig(
            model=str(tiny_llama_folder), quantization="none", device="cpu", embedding_device="host"
        )
    )
    table = beside.module.get_input_embeddings()
    assert isinstance(table, HostEmbedding)
    batch = batch_of(3)
    with torch.no_grad(), base.route.over(batch.boundaries, (None,)):
        usual = base.hidden(batch.ids, batch.positions)
    with torch.no_grad(), beside.route.over(batch.boundaries, (None,)):
        assert torch.equal(beside.hidden(batch.ids, batch.positions), usual)
    assert beside.module.to("meta").model.embed_tokens.weight.device.type == "cpu"
    assert beside.device.type == "meta"
    assert table.to(torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_shared_table_cannot_stay(tiny_model_folder: Callable[[str], Path]) -> None:
    folder = str(tiny_model_folder("qwen2"))
    with pytest.raises(ModelError, match="one table, which the head needs"):
        load_base(
            BaseConfig(model=folder, quantization="none", device="cpu", embedding_device="host")
        )


@pytest.mark.parametrize(
    "asked",
    [
        {"train": {"method": "full"}},
        {"adapter": {"modules_to_save": ["embed_tokens"]}},
    ],
)
def test_what_is_trained_is_on_the_device(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"base.embedding_device: .* not trained"):
        resolve(RunConfig.model_validate({"base": {"embedding_device": "host"}, **asked}))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["minimal", "full", "offloaded"])
def test_on_a_gpu_every_policy_gives_the_same_gradients(
    tiny_llama_folder: Path, batch_of: BatchOf, policy: Any
) -> None:
    base = adapted(tiny_llama_folder, device="cuda", dtype="bfloat16")
    batch = batch_of(*range(10)).to(base.device)
    usual = gradients(base, batch)
    for layers in (None, 1):
        enable_checkpointing(base, policy, layers=layers)
        for _ in range(3):  # buffers are used again
            for one, two in zip(usual, gradients(base, batch), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_on_a_gpu_embeddings_stay_on_the_host(tiny_llama_folder: Path, batch_of: BatchOf) -> None:
    base = adapted(tiny_llama_folder, device="cuda", embedding_device="host")
    usual = adapted(tiny_llama_folder, device="cuda")
    assert base.module.get_input_embeddings().weight.device.type == "cpu"
    batch = batch_of(9).to(usual.device)
    with torch.no_grad(), base.route.over(batch.boundaries, (None,)):
        found = base.hidden(batch.ids, batch.positions)
    with torch.no_grad(), usual.route.over(batch.boundaries, (None,)):
        assert torch.equal(found, usual.hidden(batch.ids, batch.positions))
