"""What this machine has and lacks for a run, each finding with its mend."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

__all__ = ["Check", "doctor"]

# The ranges of pyproject.toml, as (distribution, at least).
_NEEDED = (
    ("torch", (2, 10)),
    ("transformers", (5, 3)),
    ("tokenizers", (0, 22, 1)),
    ("safetensors", (0, 5)),
    ("huggingface_hub", (1, 3)),
    ("numpy", (1, 26)),
    ("pydantic", (2, 9)),
)

_EXTRAS = (
    ("plots", "matplotlib", "loss pictures"),
    ("data", "pyarrow", "Parquet files"),
    ("tensorboard", "tensorboard", "TensorBoard curves"),
    ("wandb", "wandb", "Weights & Biases curves"),
)

_GIGABYTE = 1e9
_ROOM_BYTES = 5 * _GIGABYTE


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `mend` is empty where there is nothing to do; with `ok` it is only advice."""

    name: str
    ok: bool
    found: str
    mend: str = ""


def doctor() -> list[Check]:
    """Look everything over. Nothing is raised, and no secret is shown: a token is there or not."""
    found: list[Check] = []
    for look in _LOOKS:
        found += _looked(look)
    return found


def _looked(look: Callable[[], Iterator[Check]]) -> list[Check]:
    try:
        return list(look())
    except Exception as error:  # a broken install must not keep the other findings back
        name = look.__name__.strip("_")
        return [Check(name, False, f"{type(error).__name__}: {error}", "mend this install")]


def _python() -> Iterator[Check]:
    ok = sys.version_info >= (3, 11)
    yield Check("python", ok, platform.python_version(), "" if ok else "install Python 3.11")
    yield Check("system", True, f"{platform.system()} {platform.release()}, {platform.machine()}")


def _versions() -> Iterator[Check]:
    for name, least in _NEEDED:
        wanted = ".".join(map(str, least))
        mend = f"pip install '{name}>={wanted}'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", mend)
            continue
        ok = _numbers(version) >= least
        yield Check(name, ok, version, "" if ok else mend)


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` is (2, 13)."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _devices() -> Iterator[Check]:
    import torch

    for i in range(torch.cuda.device_count()):
        has = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        said = f"{has.name}, {_gb(free)} free of {_gb(total)}, compute {has.major}.{has.minor}"
        ok = has.major >= 7
        yield Check(
            f"cuda:{i}", ok, said, "" if ok else "too old for this torch: use base.device=cpu"
        )
    if torch.cuda.is_available():
        return
    if torch.backends.mps.is_available():
        yield Check("mps", True, "Apple GPU")
    elif shutil.which("nvidia-smi"):
        mend = "install a CUDA build of torch, see pytorch.org; the CPU works meanwhile"
        yield Check("cuda", False, f"a driver, but torch {torch.__version__} sees no device", mend)
    else:
        yield Check("device", True, "CPU only", "small models only; a GPU is many times faster")


def _processor() -> Iterator[Check]:
    import torch

    flags = _cpu_flags()
    names = {
        "avx2": "AVX2",
        "avx512f": "AVX-512",
        "avx512_bf16": "bf16 products",
        "amx_bf16": "AMX bf16",
        "asimd": "NEON",
        "bf16": "bf16 products",
    }
    has = list(dict.fromkeys(name for flag, name in names.items() if flag in flags))
    said = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; {', '.join(has) or 'plain'}"
    slow = not flags.isdisjoint({"sse2"}) and "avx2" not in flags
    yield Check("processor", True, said, "without AVX2 training is slow" if slow else "")
    if "bf16 products" not in has and "AMX bf16" not in has:
        yield Check("bfloat16", True, "no bf16 products: weights may be bf16, the work is float32")


def _kernels() -> Iterator[Check]:
    """Which compiled code does the work of 4- and 8-bit weights on this processor."""
    from pennyweight.quant.kernels.cpu import why_none
    from pennyweight.quant.kernels.cpu.library import chosen

    serving, (why, _, mend) = chosen(), why_none().partition(": ")
    if serving is not None:
        fast = "base.dtype: bfloat16 is about twice as fast as float32 here"
        hint = fast if serving.multiply_bf16 is not None else ""
        yield Check("cpu kernels", True, f"{serving.variant}, compiled", hint)
    else:
        yield Check("cpu kernels", True, f"pure torch, many times slower: {why}", mend)


def _gpu_kernels() -> Iterator[Check]:
    """Which Triton kernels serve on each GPU, after their trials there, and why others do not."""
    import torch

    from pennyweight.blocks.kernels import KERNELS, why_eager
    from pennyweight.quant.kernels import why_pure_torch

    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        why = {"4-bit": why_pure_torch(device)}
        why |= {name: why_eager(name, device) for name in KERNELS}
        serving = [name for name, reason in why.items() if not reason]
        reasons = dict.fromkeys(reason for reason in why.values() if reason)
        said = f"{', '.join(serving) or 'none'} by Triton"
        if reasons:
            said += f"; pure torch does the rest, more slowly: {'; '.join(reasons)}"
        yield Check(f"gpu kernels cuda:{i}", True, said)


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"asimd"} if platform.machine() in ("arm64", "aarch64") else set()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _memory() -> Iterator[Check]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        free = page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return
    limit = _container_limit()
    said = f"{_gb(free)} free of {_gb(total)}"
    if limit is not None and limit < total:
        said += f", this container may use {_gb(limit)}"
    ok = min(total, limit or total) >= 2 * _GIGABYTE
    yield Check("memory", ok, said, "" if ok else "close programs; even small models need 2 GB")


def _container_limit() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _folders() -> Iterator[Check]:
    places = {
        "here": Path.cwd(),
        "cache": _cache_folder(),
        "temporary": Path(tempfile.gettempdir()),
    }
    for name, folder in places.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        writable = os.access(there, os.W_OK | os.X_OK)
        free = shutil.disk_usage(there).free
        ok = writable and free >= _ROOM_BYTES
        mend = ""
        if not writable:
            mend = f"give yourself write rights: chmod u+w {there}"
        elif not ok:
            mend = f"free space: a run of a small model takes {_gb(_ROOM_BYTES)}"
        state = "" if writable else ", not writable"
        yield Check(f"folder {name}", ok, f"{folder}: {_gb(free)} free{state}", mend)


def _bases() -> Iterator[Check]:
    """Quantized bases kept from earlier starts: how much room they take, and how to have it back."""
    from pennyweight.model.cache import LIMIT, cache_folder, kept_bases, limit_bytes

    kept, limit = kept_bases(), limit_bytes()
    said = f"{len(kept)} in {cache_folder()}, {_gb(sum(kept.values()))} of at most {_gb(limit)}"
    mend = f"delete the folder to have the room back; {LIMIT}=off keeps none" if kept else ""
    yield Check("quantized bases", True, said if limit else f"none are kept: {LIMIT} is off", mend)


def _cache_folder() -> Path:
    named = os.environ.get("PENNYWEIGHT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "pennyweight"


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    yield Check("hugging face cache", True, f"{cache}: {models} models")
    if constants.HF_HUB_OFFLINE:
        yield Check("hugging face", True, "offline by HF_HUB_OFFLINE: only what is in the cache")
    elif get_token():
        yield Check("hugging face", True, "a token is set")
    else:
        yield Check("hugging face", True, "no token", "gated models need one: hf auth login")


def _extras() -> Iterator[Check]:
    for extra, module, purpose in _EXTRAS:
        there = util.find_spec(module) is not None
        found = "installed" if there else f"absent: no {purpose}"
        yield Check(
            f"extra {extra}", True, found, "" if there else f'pip install "pennyweight[{extra}]"'
        )


def _gb(size: float) -> str:
    return f"{size / _GIGABYTE:,.1f} GB"


_LOOKS = (
    _python,
    _versions,
    _devices,
    _processor,
    _kernels,
    _gpu_kernels,
    _memory,
    _folders,
    _bases,
    _hub,
    _extras,
)
