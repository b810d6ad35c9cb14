"""What one pass keeps for backward, counted from the layers' shapes.

A decoder layer (RMSNorm, attention, RMSNorm, gated feed-forward) with a frozen base keeps, a
token: the input of each norm, q, k, v, the attention's output and log-sum-exp, gate, act(gate),
up and their product, and for each adapter its input (shared by layers that read the same
tensor) and A(x). Frozen linear layers keep nothing. `tests/plan` holds these counts against
the tensors that autograd really saves.

Policies: `none` keeps all of it; `minimal` recomputes all but the attention's output and
`down_proj`, `full` recomputes each layer from its input, `offloaded` also moves those inputs
to host memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from pennyweight.plan.setting import Recompute, Setting
from pennyweight.shapes import Parameter

__all__ = [
    "kept_bytes",
    "largest_linear",
    "layer_bytes",
    "rebuilt_bytes",
    "transient_bytes",
]

_OUTPUT_LEAVES = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "wo", "w2")
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
    """Bytes a token that a whole forward pass keeps under a policy."""
    shapes = setting.shapes
    if policy == "none":
        return sum(layer_bytes(setting, i) * n for i, n in setting.layer_kinds) + _ends(setting)
    boundary = float(shapes.hidden * _residual_bytes(setting))
    if policy == "minimal":
        boundary += shapes.heads * (shapes.head_dim * setting.product_bytes + 4)
    return boundary * (2 if policy == "offloaded" else shapes.layers) + _ends(setting)


def rebuilt_bytes(setting: Setting, policy: Recompute) -> float:
    """Bytes a token of the one layer that backward recomputes and holds; 0 without recompute."""
    if policy == "none":
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


def largest_linear(setting: Setting) -> int:
    """Numbers in the largest linear weight."""
    return max((p.elements for p in setting.shapes.linears), default=0)


def _norms(setting: Setting, parameters: Iterable[Parameter]) -> float:
    """RMSNorm keeps its input in float32 and 1/rms; LayerNorm its input, mean and 1/deviation."""
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
        else:
            kept += groups * (width * 4 + 4)
            if setting.full:
                kept += groups * width * 4  # the normalized rows, for the weight's gradient
    return kept


def _inputs(setting: Setting, parameters: Iterable[Parameter]) -> float:
    """Inputs of adapted linear layers, once for those that read the same tensor, and A(x)."""
    size, dropped = setting.product_bytes, setting.config.adapter.lora_dropout > 0
    readers: dict[str, list[Parameter]] = defaultdict(list)
    kept = 0.0
    for linear in (p for p in parameters if p.kind == "linear"):
        rank = setting.ranks.get(linear.module)
        if rank is None and not setting.full:
            continue
        block, _, leaf = linear.module.rpartition(".")
        readers[linear.module if leaf in _OUTPUT_LEAVES else block].append(linear)
        kept += (rank or 0) * size
    for sharing in readers.values():
        width = sharing[0].shape[1] * size
        if setting.full:
            kept += width * (len(sharing) if setting.mixed else 1)  # each casts for itself
        else:
            kept += width * (2 * len(sharing) if dropped else 1)  # factors and dropped input
    return kept


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
    if shapes.softcap or setting.config.base.attention == "eager":
        # 256 queries at a time see the keys up to the last of them
        seen = min(float(setting.longest), (setting.longest + 256) / 2)
        kept += seen * (4 * shapes.heads * (2 if shapes.softcap else 1) + 1)
    adapted = setting.full or any(_leaf(n) in _OUTPUT_LEAVES for n in setting.ranks)
    if _one_document(setting) and adapted:
        return kept
    return kept + across * size


def _one_document(setting: Setting) -> bool:
    """One document fills the row, or the kernel takes the documents of a row at once."""
    fused = setting.device.kind == "cuda" and setting.product_bytes == 2
    return fused or setting.micro_tokens <= setting.longest


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _feed_forward(setting: Setting, width: int) -> float:
    """gate, act(gate) and up, whose product is `down_proj`'s input; else what the activation keeps."""
    shapes = setting.shapes
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
