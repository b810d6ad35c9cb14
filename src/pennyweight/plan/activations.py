"""What one pass keeps for backward, counted from the layers' shapes.

A decoder layer (RMSNorm, attention, RMSNorm, gated feed-forward) with a frozen base keeps, a
token: the input of each norm, q, k, v, the attention's output and log-sum-exp, gate and up, and
for each adapter A(x); its input is one of these, or formed again from them. Frozen linear layers keep
nothing. `tests/plan` holds these counts
against the tensors that autograd really saves.

Policies: `none` keeps all of it; `full` recomputes each layer from its input, but for the product
with `down_proj`; `minimal` also keeps what attention gave; `offloaded` is `full` with the inputs
in host memory, two of them on the device at a time. A policy may hold for the first layers alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from pennyweight.plan.setting import Recompute, Setting
from pennyweight.shapes import Parameter, Shapes

__all__ = [
    "forward_bytes",
    "host_bytes",
    "kept_bytes",
    "largest_linear",
    "layer_bytes",
    "rebuilt_bytes",
    "transient_bytes",
]

_OUTPUT_LEAVES = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "wo", "w2")
_FORMED_AGAIN = ("down_proj",)
_FORMED_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
# Tensors as wide as the feed-forward that the activation keeps, by how transformers writes it.
_KEPT_BY_ACTIVATION = {"gelu_new": 4, "gelu_fast": 4, "gelu_pytorch_tanh": 1, "relu": 1}


def layer_bytes(setting: Setting, index: int = 0) -> float:
    """Bytes a token that decoder layer `index` keeps for backward."""
    shapes = setting.shapes
    parameters = shapes.by_layer[index]
    return (
        _norms(setting, parameters)
        + _inputs(setting, parameters)
        + _attention(setting, parameters)
        + _feed_forward(setting, shapes.intermediate)
    )


def kept_bytes(setting: Setting, policy: Recompute) -> float:
    """Bytes a token that a whole forward pass keeps under a policy, on the device."""
    shapes, again = setting.shapes, setting.recomputed_layers if policy != "none" else 0
    whole = sum(layer_bytes(setting, i) * n for i, n in setting.layer_kinds)
    if not again:
        return whole + _ends(setting) + _first_rows(setting)
    boundary = float(shapes.hidden * _residual_bytes(setting))
    kept = again * boundary + boundary + 4  # the last norm's input and 1/rms
    if policy == "minimal" and not _written_out(setting):
        kept += again * shapes.heads * (shapes.head_dim * setting.product_bytes + 4)
    if policy == "offloaded" and setting.device.kind == "cuda":
        kept = min(kept, 2 * boundary + 4)
    return kept + whole * (1 - again / shapes.layers) + _ends(setting)


def _first_rows(setting: Setting) -> float:
    """The first norm's output: nothing below it learns, so it has no backward to form it again in."""
    first = setting.shapes.by_layer[0]
    read = any(p.module in setting.ranks and _leaf(p.module) not in _OUTPUT_LEAVES for p in first)
    formed = read and not setting.full and _norms_are_formed(first)
    return float(setting.shapes.hidden * setting.product_bytes) if formed else 0.0


def host_bytes(setting: Setting, policy: Recompute) -> float:
    """Bytes a token that `offloaded` holds in host memory, beside a device that has its own."""
    if policy != "offloaded" or setting.device.kind != "cuda":
        return 0.0
    boundaries = setting.recomputed_layers + 1
    return float(boundaries * setting.shapes.hidden * _residual_bytes(setting))


def rebuilt_bytes(setting: Setting, policy: Recompute) -> float:
    """Bytes a token of the one layer that backward recomputes and holds; 0 without recompute."""
    if policy == "none" or not setting.recomputed_layers:
        return 0.0
    return max(layer_bytes(setting, index) for index, _ in setting.layer_kinds)


def transient_bytes(setting: Setting, policy: Recompute) -> float:
    """Bytes of the fullest instant of backward beyond what is kept, for the whole micro-batch.

    Either the way in through loss and last norm (five float32 rows of hidden width), or one
    feed-forward: two gradients of its width, or one beside the dense weight it comes from. With
    recompute the rebuilt layer stands beside that.
    """
    shapes, size, tokens = setting.shapes, setting.product_bytes, setting.micro_tokens
    entry = 5 * 4 * shapes.hidden * tokens
    across = shapes.heads * shapes.head_dim
    wide = 2 * max(shapes.intermediate, across) * size * tokens
    weight = largest_linear(setting) * size if setting.storage != "none" else 0
    beside = (shapes.hidden + shapes.intermediate) * size * tokens + weight
    return max(entry, rebuilt_bytes(setting, policy) * tokens + max(wide, beside))


def forward_bytes(
    shapes: Shapes, tokens: int, *, product_bytes: int, logits: int, quantized: bool
) -> int:
    """Bytes of the fullest instant of a pass that keeps nothing for backward.

    A layer: the residual rows, a norm's, and the three of its feed-forward or attention; one dense
    weight beside them. At the end so many rows of logits, in their own type and in float32 twice.
    """
    wide = max(shapes.intermediate, shapes.heads * shapes.head_dim)
    rows = (2 * shapes.hidden + 3 * wide) * product_bytes * tokens
    dense = max((p.elements for p in shapes.linears), default=0) * product_bytes if quantized else 0
    ends = shapes.hidden * product_bytes * tokens + logits * shapes.vocab * (product_bytes + 8)
    return max(rows + dense, ends)


def largest_linear(setting: Setting) -> int:
    """Numbers in the largest linear weight."""
    return max((p.elements for p in setting.shapes.linears), default=0)


def _norms(setting: Setting, parameters: Iterable[Parameter]) -> float:
    """RMSNorm keeps its input and 1/rms, a trained one a float32 copy and the normalized rows too;
    LayerNorm keeps its input, mean and 1/deviation."""
    shapes, size = setting.shapes, setting.product_bytes
    rows = list(parameters)
    biased = {p.module for p in rows if p.name.endswith(".bias")}
    kept = 0.0
    for norm in rows:
        if norm.kind != "norm" or norm.name.endswith(".bias"):
            continue
        width, groups = norm.shape[0], 1
        if (
            width != shapes.hidden
            and width == shapes.head_dim
            and _leaf(norm.module).isidentifier()
        ):
            # one for all heads of the queries or keys (Qwen3), not one a head (StableLM 2 12B)
            groups = shapes.kv_heads if _leaf(norm.module).startswith("k") else shapes.heads
        if norm.module in biased:
            kept += groups * (width * size + 8)
        elif setting.full:
            kept += groups * (2 * width * 4 + 4)
        else:
            kept += groups * (width * size + 4)
    return kept


def _inputs(setting: Setting, parameters: Iterable[Parameter]) -> float:
    """Inputs of adapted linear layers, once for those that read the same tensor, and A(x). What an
    RMSNorm gives is formed again from its input."""
    size = setting.product_bytes
    readers: dict[str, list[Parameter]] = defaultdict(list)
    kept, rows = 0.0, list(parameters)
    for linear in (p for p in rows if p.kind == "linear"):
        rank = setting.ranks.get(linear.module)
        if rank is None and not setting.full:
            continue
        block, _, leaf = linear.module.rpartition(".")
        kept += (rank or 0) * size
        if leaf in _FORMED_AGAIN and _gate_and_up_alone(setting):
            continue
        readers[linear.module if leaf in _OUTPUT_LEAVES else block].append(linear)
    for sharing in readers.values():
        width = sharing[0].shape[1] * size
        if setting.full:
            kept += width * (len(sharing) if setting.mixed else 1)  # each casts for itself
        elif _leaf(sharing[0].module) in _OUTPUT_LEAVES or not _norms_are_formed(rows):
            kept += width
    return kept


def _norms_are_formed(parameters: Iterable[Parameter]) -> bool:
    """Whether the layer's norms are RMSNorms: `pennyweight.blocks`."""
    rows = list(parameters)
    biased = {p.module for p in rows if p.name.endswith(".bias")}
    norms = [p for p in rows if p.kind == "norm"]
    return bool(norms) and not any(p.module in biased for p in norms)


def _attention(setting: Setting, parameters: Iterable[Parameter]) -> float:
    """q, k, v, output and log-sum-exp; the output of one document is also `o_proj`'s input.

    Attention that is written out keeps each score it softened, in float32, and once more
    before its cap.
    """
    shapes, size = setting.shapes, setting.product_bytes
    across = shapes.heads * shapes.head_dim
    kept = float((across + 2 * shapes.kv_heads * shapes.head_dim) * size + 4 * shapes.heads)
    if any("qkv" in _leaf(p.module) and p.kind == "linear" for p in parameters):
        kept += (across + shapes.kv_heads * shapes.head_dim) * size  # v is a view of the three
    if _written_out(setting):
        # 256 queries at a time see the keys up to the last of them
        seen = min(float(setting.longest), (setting.longest + 256) / 2)
        kept += seen * (4 * shapes.heads * (2 if shapes.softcap else 1) + 1)
    adapted = setting.full or any(_leaf(n) in _OUTPUT_LEAVES for n in setting.ranks)
    if _joined(setting) and adapted:
        return kept
    return kept + across * size


def _joined(setting: Setting) -> bool:
    """The kernel gives one output for all documents, which the layer after it reads as it is."""
    fused = setting.device.kind == "cuda" and setting.product_bytes == 2
    on_cpu = setting.device.kind == "cpu"
    return (
        (fused or on_cpu) and not _written_out(setting)
    ) or setting.micro_tokens <= setting.longest


def _written_out(setting: Setting) -> bool:
    """Attention in plain operations, where every score is a tensor."""
    return setting.shapes.softcap or setting.config.base.attention == "eager"


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _gate_and_up_alone(setting: Setting) -> bool:
    """Whether a feed-forward keeps gate and up and forms the rest again: `pennyweight.blocks`."""
    shapes = setting.shapes
    return shapes.gated and shapes.activation in _FORMED_ACTIVATIONS and not setting.full


def _feed_forward(setting: Setting, width: int) -> float:
    """gate and up; trained, act(gate) too, and their product is `down_proj`'s input. Without a
    gate what the activation keeps."""
    shapes = setting.shapes
    if _gate_and_up_alone(setting):
        return 2 * width * setting.product_bytes
    kept = _KEPT_BY_ACTIVATION.get(shapes.activation, 1)
    return width * setting.product_bytes * (kept + 2 if shapes.gated else kept)


def _ends(setting: Setting) -> float:
    """The last hidden state, which the loss reads, and the rotary tables.

    Layers count two norm inputs each. With a frozen embedding the first layer's is not kept, and
    the last norm's is; with a trained one there is one more.
    """
    shapes, size = setting.shapes, setting.product_bytes
    kept = float(shapes.hidden * size + 2 * shapes.head_dim * (4 if setting.mixed else size))
    return kept + (8 * shapes.hidden if setting.full else 0)


def _residual_bytes(setting: Setting) -> int:
    """Bytes of one number of the residual stream."""
    return 4 if setting.mixed else setting.product_bytes
