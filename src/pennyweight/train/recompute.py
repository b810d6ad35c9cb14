"""What becomes of a layer's inside between forward and backward, layer by layer.

`none` keeps it. `full` keeps the layer's input and computes the rest again in backward (Chen et
al. 2016, one checkpoint a decoder layer), but for the product with `down_proj`, whose output
nothing in the layer reads. `minimal` also keeps what attention gave, so that attention, whose
cost grows with the square of a document, is not computed twice. `offloaded` is `full` with the
inputs in host memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pennyweight.model import BaseModel
from pennyweight.route import Route
from pennyweight.side_stream import SideStream

__all__ = [
    "HostStore",
    "Recompute",
    "disable_checkpointing",
    "enable_checkpointing",
    "host_store",
    "recomputing",
]

Recompute = Literal["none", "minimal", "full", "offloaded"]

# What a fused attention is called among torch's operations, on all devices.
_ATTENTION = (
    "pennyweight::attend",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)


def enable_checkpointing(
    base: BaseModel,
    policy: Recompute = "full",
    *,
    layers: int | None = None,
    store: HostStore | None = None,
) -> None:
    """Let the first `layers` decoder layers (None: all) go by this policy; the others keep all.

    The first ones are held longest. Only the layers' own training flag is raised, which is what
    transformers asks before it recomputes; what is inside them stays in evaluation mode. The
    route, dropout seed included, is read again, so backward belongs inside `route.over(...)`.
    """
    disable_checkpointing(base)
    if policy == "none" or layers == 0:
        return
    module: Any = base.module
    options = {
        "use_reentrant": False,
        "preserve_rng_state": False,
        "context_fn": lambda: _contexts(base.route, attention_kept=policy == "minimal"),
    }
    # The name since transformers 5.20 or so; the older one warns there.
    if hasattr(module, "activation_checkpointing_enable"):
        module.activation_checkpointing_enable(options)
    else:
        module.gradient_checkpointing_enable(options)
    # Needed by the reentrant kind alone; here it would compute gradients nobody reads.
    module.disable_input_require_grads()
    for index, layer in enumerate(_decoder_layers(module)):
        layer.gradient_checkpointing = layer.training = layers is None or index < layers
    if policy == "offloaded":
        base.keeping = (store or host_store(base)).keeping


def disable_checkpointing(base: BaseModel) -> None:
    """Undo `enable_checkpointing`."""
    module: Any = base.module
    if hasattr(module, "activation_checkpointing_disable"):
        module.activation_checkpointing_disable()
    else:
        module.gradient_checkpointing_disable()
    module.eval()
    base.keeping = contextlib.nullcontext


@contextlib.contextmanager
def recomputing(
    base: BaseModel, policy: Recompute, *, layers: int | None, store: HostStore | None
) -> Iterator[None]:
    """The policy for the passes inside, of whatever trainee; others of the base go without."""
    enable_checkpointing(base, policy, layers=layers, store=store)
    try:
        yield
    finally:
        disable_checkpointing(base)


def host_store(base: BaseModel) -> HostStore:
    """Host memory for the layer inputs of a base, which passes may share one after the other."""
    return HostStore(base.device, width=int(base.head.weight.shape[1]))


def _decoder_layers(module: nn.Module) -> list[Any]:
    """The repeated blocks that transformers can recompute, in order."""
    lists = (each for each in module.modules() if isinstance(each, nn.ModuleList))
    return [block for each in lists for block in each if hasattr(block, "gradient_checkpointing")]


def _contexts(
    route: Route, *, attention_kept: bool
) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """Around a layer's first run and around its second."""
    if not attention_kept:
        return contextlib.nullcontext(), _again(route, contextlib.nullcontext())
    outputs: deque[Any] = deque()
    return _Kept(outputs), _again(route, _GivenBack(outputs))


@contextlib.contextmanager
def _again(route: Route, inner: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    before, route.recomputing = route.recomputing, True
    try:
        with inner:
            yield
    finally:
        route.recomputing = before


class _Kept(TorchDispatchMode):
    """Around a layer: what its attention gives is kept, in order."""

    def __init__(self, outputs: deque[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        if func in _attention_operations():
            self.outputs.append(given)
        return given


class _GivenBack(TorchDispatchMode):
    """Around the same layer again: attention gives what it gave, and is not run."""

    def __init__(self, outputs: deque[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _attention_operations():
            return self.outputs.popleft()
        return func(*args, **(kwargs or {}))


@cache
def _attention_operations() -> frozenset[Any]:
    """Those of `_ATTENTION` that this torch has."""
    with contextlib.suppress(ImportError):
        import torch.nn.attention.varlen
    found = []
    for name in _ATTENTION:
        space, _, leaf = name.partition("::")
        with contextlib.suppress(AttributeError):
            found.append(getattr(getattr(torch.ops, space), leaf).default)
    return frozenset(found)


class HostStore:
    """Hidden rows that autograd keeps, `[1, tokens, width]`, in host memory until backward.

    On a card copies run on a stream of their own, to and from pinned buffers that the next pass
    uses again: at most two leave at a time, and while one layer is computed again the input of
    the layer before it is on its way back. On a CPU the same code copies there and then.
    """

    def __init__(self, device: torch.device, *, width: int) -> None:
        self.device, self.width = device, width
        self._side = SideStream(device)
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self.held_bytes = 0
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._parked: list[weakref.ref[_Parked]] = []

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Around one forward pass."""
        self._parked = []
        with torch.autograd.graph.saved_tensors_hooks(self._park, self._fetch):
            yield

    def _park(self, tensor: Tensor) -> Tensor | _Parked:
        wanted = tensor.ndim == 3 and tensor.shape[0] == 1 and tensor.shape[2] == self.width
        if not wanted or not tensor.is_floating_point() or isinstance(tensor, nn.Parameter):
            return tensor
        waiting = self.free.setdefault((tensor.shape, tensor.dtype), [])
        host = waiting.pop() if waiting else self._buffer(tensor)
        with self._side.copying():
            host.copy_(tensor, non_blocking=True)
        if (copied := self._side.reached()) is not None:
            self._leaving.append((tensor, copied))
            self._let_go(but=2)
        parked = _Parked(self, host, len(self._parked))
        self._parked.append(weakref.ref(parked))
        return parked

    def _fetch(self, parked: Tensor | _Parked) -> Tensor:
        if isinstance(parked, Tensor):
            return parked
        self._let_go(but=0)
        self._send_back(parked)
        if parked.place > 0 and (before := self._parked[parked.place - 1]()) is not None:
            self._send_back(before)
        assert parked.here is not None
        tensor, arrived = parked.here
        parked.here = None
        self._side.wait(arrived)
        if arrived is not None:
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor

    def _let_go(self, *, but: int) -> None:
        """Drop what has left the device, once it has, but for the last few."""
        while len(self._leaving) > but:
            _, copied = self._leaving.popleft()
            self._side.wait(copied)

    def _send_back(self, parked: _Parked) -> None:
        """Begin to copy it to the device, unless it is on its way."""
        if parked.here is not None:
            return
        with self._side.copying():
            tensor = torch.empty(parked.host.shape, dtype=parked.host.dtype, device=self.device)
            tensor.copy_(parked.host, non_blocking=True)
        parked.here = tensor, self._side.reached()

    def _buffer(self, like: Tensor) -> Tensor:
        self.held_bytes += like.nbytes
        return self._side.host_buffer(like.shape, like.dtype)


class _Parked:
    """One tensor in host memory; its buffer is free again once nobody can ask for it."""

    def __init__(self, store: HostStore, host: Tensor, place: int) -> None:
        self.store, self.host, self.place = store, host, place
        self.here: tuple[Tensor, Any] | None = None

    def __del__(self) -> None:
        self.store.free.setdefault((self.host.shape, self.host.dtype), []).append(self.host)
