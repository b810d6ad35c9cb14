"""A run that takes a second: a random Llama of two layers with the built-in tokenizer, 26 rows.

Everything a real run has is in it: a base in NF4 with double quantization, dropout, packing,
accumulation, several epochs, evaluations, checkpoints more often than they are kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pennyweight.config import RunConfig

__all__ = ["STEPS", "bits", "build_model", "described", "write_rows"]

STEPS = 8


def build_model(folder: Path) -> Path:
    """A random Llama of about 150,000 parameters, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import pennyweight.builtin

    there = Path(pennyweight.builtin.__file__).parent / "model"
    known = json.loads((there / "config.json").read_text())
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        **{name: known[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(there / name, folder / name)
    return folder


def write_rows(path: Path, count: int = 26, *, salt: str = "") -> Path:
    """Chat rows of a few words, all different."""
    words = ("red", "green", "blue", "one", "two", "three", "cat", "dog")
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            a, b = words[i % 8], words[(i // 8 + i) % 8]
            turns = [
                {"role": "user", "content": f"say {a} and {b} {i}{salt}"},
                {"role": "assistant", "content": f"{b} {a} " * (1 + i % 3)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def described(folder: Path, name: str = "run", **changes: Any) -> RunConfig:
    """The run over `folder/model` and `folder/rows.jsonl` that writes to `folder/name`.

    `changes` are keys such as `train__max_steps`.
    """
    tree: dict[str, Any] = {
        "base": {"model": str(folder / "model"), "quantization": "nf4", "device": "cpu"},
        "adapter": {"r": 4, "lora_dropout": 0.1},
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.1, "max_length": 64},
        "train": {
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "tokens_per_step": 256,
            "gradient_accumulation_steps": 2,
            "eval_steps": 4,
            "save_steps": 2,
            "save_total_limit": 2,
        },
        "evaluate": {"max_rows": 4, "generate_rows": 0},
        "output_dir": str(folder / name),
    }
    for key, value in changes.items():
        group, _, field = key.partition("__")
        if field:
            tree.setdefault(group, {})[field] = value
        else:
            tree[group] = value
    return RunConfig.model_validate(tree)


def bits(folder: Path) -> str:
    """A digest of what a finished run came to: adapter, optimizer, metric log.

    Random states are left out: a new process begins with some that nobody chose, and a run draws
    from none of them.
    """
    from safetensors import safe_open

    from pennyweight.report import metrics_of, read_events
    from pennyweight.train.checkpoint import steps_in

    digest = hashlib.sha256()
    checkpoints = folder / "checkpoints"
    last = checkpoints / f"step-{steps_in(checkpoints)[0]:06d}" / "state.safetensors"
    for path in (folder / "adapter" / "adapter_model.safetensors", last):
        with safe_open(path, framework="pt") as file:
            for name in sorted(n for n in file.keys() if not n.startswith("random/")):  # noqa: SIM118
                digest.update(name.encode() + file.get_tensor(name).numpy().tobytes())
    log = metrics_of(read_events(folder / "events.jsonl"))
    digest.update(json.dumps(log, sort_keys=True).encode())
    return digest.hexdigest()
