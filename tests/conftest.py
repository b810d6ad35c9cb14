"""What all tests share: shapes checked at run time, one thread, no network, tiny models built here.

`tiny_model_folder("qwen3")` is a folder as transformers would save it: a random model of about
20,000 parameters with its tokenizer and chat template, built once in a session. Biases and norm
weights are random too, so that a forgotten one shows.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Real models would be kept, quantized, in the user's own cache.
os.environ.setdefault("PENNYWEIGHT_BASE_CACHE", "off")
# Outside the person's home; the list of fonts takes seconds to make, so it stays from run to run.
os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / "pennyweight-matplotlib"))

from tests import audit

# From here on, before anything of the project's is imported, this process and all it starts are
# watched: see `watched` below.
_violations: list[str] = []
_told_by_children = tempfile.mkstemp(prefix="pennyweight-audit-")[1]
_watch = audit.install(_violations.append)
os.environ |= audit.environment(_told_by_children, _watch.folders)

from jaxtyping import install_import_hook

# The rooms whose functions say shapes; what stands elsewhere mypy checks. An int is welcome where a
# float is asked for, as everywhere in Python (PEP 484).
SHAPED = (
    *("attention", "blocks", "compare.spectrum", "generate", "lora", "loss", "model", "optim"),
    *("quant", "route"),
)
install_import_hook(
    [f"pennyweight.{room}" for room in SHAPED],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# A shell's background job begins with Ctrl-C ignored, and so would every run under test.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

# More embedding rows than the tokenizer has tokens, as many published models have.
VOCABULARY_ROWS = 304

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}

# family -> (model_type, what its config has beside _SHAPE). Windows of 8 tokens are short enough
# for a test's rows to leave them.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"head_dim": 8, "sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": 8, "original_max_position_embeddings": 256}),
    # As stabilityai/stablelm-2-1_6b: a quarter of each head rotates, q, k and v have biases.
    "stablelm": (
        "stablelm",
        {"use_qkv_bias": True, "partial_rotary_factor": 0.25, "num_key_value_heads": 4},
    ),
    # As stabilityai/stablelm-2-12b: norms on queries and keys, attention beside the MLP.
    "stablelm_12b": (
        "stablelm",
        {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.25},
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
    ),
}


def build_tokenizer() -> Any:
    """A byte-level tokenizer of 288 tokens: bytes, merges, five specials; encoding puts BOS first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the answer and the question in the other language"], trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model_folder(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Save a random model of this family with its tokenizer, as transformers writes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, particular = FAMILIES[family]
    tokenizer = build_tokenizer()
    shape = {} if family == "gpt2" else _SHAPE
    ids = {
        "vocab_size": VOCABULARY_ROWS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(model_type, **{**shape, **particular, **ids})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model_folder(family)`: a saved tiny model; families are the keys of FAMILIES."""
    built: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = build_model_folder(family, tmp_path_factory.mktemp(family))
        return built[family]

    return folder


@pytest.fixture(scope="session")
def tiny_llama_folder(tiny_model_folder: Callable[[str], Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def families() -> tuple[str, ...]:
    return tuple(FAMILIES)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and data; tests that read it skip themselves without it."""
    named = os.environ.get("PENNYWEIGHT_TEST_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "models").is_dir():
        pytest.skip(f"no real data at {folder}: set PENNYWEIGHT_TEST_DATA to its folder")
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test loads a pickle, writes outside temporary folders, or connects to another machine."""
    yield
    excused = "unpickled " if "own_pickle" in request.keywords else None
    if found := [said for said in violations() if not excused or not said.startswith(excused)]:
        pytest.fail("\n".join(["against the rules of tests/audit.py:", *dict.fromkeys(found)]))


def violations() -> list[str]:
    """What was done against the rules since the last call, in this process or in its children."""
    with Path(_told_by_children).open(encoding="utf-8") as log:
        told = log.read().splitlines()
    os.truncate(_told_by_children, 0)
    found = [*_violations, *told]
    _violations.clear()
    return found


def pytest_unconfigure() -> None:
    _watch.paused = True
    Path(_told_by_children).unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="needs a CUDA device, none is here")
    for item in items:
        # Not `keywords`: the names of folders above are among them.
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(absent)
