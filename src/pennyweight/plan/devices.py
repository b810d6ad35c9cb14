"""Devices by name, this machine's own, and memory sizes as people write them.

Throughput is the vendors' dense figure for products with fp32 accumulation; what a training
run reaches of it is `pennyweight.plan.cost`'s business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal

from pennyweight.errors import ConfigError

__all__ = ["DEVICES", "Device", "named_device", "parse_memory", "resident_bytes", "this_device"]

GIB = 2**30
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True, slots=True)
class Device:
    """Where a run happens. Memory in bytes, bandwidth in bytes a second, throughput in FLOP/s.

    The last three are known where they were measured: what a process holds beside tensors, 4-bit
    weights turned back in a second, and what an operation costs however small it is.
    """

    name: str
    kind: Literal["cuda", "cpu", "mps"]
    memory_bytes: int
    bandwidth: float
    fp32: float
    half: float | None = None
    half_type: Literal["bfloat16", "float16"] = "bfloat16"
    process_bytes: int | None = None
    dequantized: float | None = None
    launch_s: float | None = None

    @property
    def dtype(self) -> str:
        """What `dtype: auto` means here: the 16-bit type it multiplies fast, else float32."""
        return self.half_type if self.half else "float32"

    def flops(self, dtype: str) -> float:
        """FLOP/s of products in this type."""
        return self.half if self.half and dtype != "float32" else self.fp32


def _card(name: str, mib: int, gb_s: float, fp32: float, half: float, **kw: str) -> Device:
    return Device(name, "cuda", mib * 2**20, gb_s * 1e9, fp32 * 1e12, half * 1e12, **kw)  # type: ignore[arg-type]


# memory in MiB as the driver shows it, GB/s, TFLOP/s fp32, TFLOP/s bf16 (data sheets)
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _card("rtx3060", 12288, 360, 12.7, 25.5),
        _card("rtx3080", 10240, 760, 29.8, 59.5),
        _card("rtx3090", 24576, 936, 35.6, 71.0),
        _card("rtx4060", 8188, 272, 15.1, 30.2),
        _card("rtx4060ti16", 16380, 288, 22.1, 44.1),
        _card("rtx4070", 12282, 504, 29.2, 58.3),
        _card("rtx4080", 16376, 717, 48.7, 97.5),
        _card("rtx4090", 24564, 1008, 82.6, 165.2),
        _card("rtx5090", 32607, 1792, 104.8, 209.5),
        _card("t4", 15360, 320, 8.1, 65.0, half_type="float16"),
        _card("l4", 23034, 300, 30.3, 121.0),
        _card("a10", 23028, 600, 31.2, 125.0),
        _card("a6000", 49140, 768, 38.7, 154.8),
        _card("l40s", 46068, 864, 91.6, 362.0),
        _card("a100-40", 40960, 1555, 19.5, 312.0),
        _card("a100-80", 81920, 2039, 19.5, 312.0),
        _card("h100", 81559, 3350, 67.0, 989.0),
        _card("h200", 143771, 4800, 67.0, 989.0),
        _card("mi300x", 196592, 5300, 163.4, 1307.0),
        Device("m2-max", "mps", 32 * GIB, 400e9, 13.6e12),
        Device("m3-max", "mps", 36 * GIB, 400e9, 14.2e12),
    )
}

_CPU_FLOPS_A_CORE = 70e9  # fp32 products with AVX2, measured on Zen 3
_CPU_BANDWIDTH = 23e9  # one socket's filling speed, measured there too


def parse_memory(text: str | int) -> int:
    """Bytes in `24GB` (1e9 each), `24GiB` (2**30 each), `24g`, `512MB` or a plain number.

    >>> parse_memory("24GB"), parse_memory("1.5GiB")
    (24000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text), re.IGNORECASE)
    if not found or (found.group(3) and not found.group(2)):
        raise ConfigError(f"memory {str(text)!r} is not a size; write it like 24GB or 22.5GiB")
    number, unit, binary = float(found.group(1)), found.group(2).lower(), found.group(3)
    size = int(number * (_BINARY if binary else _UNITS)[unit])
    if size < 2**20:
        raise ConfigError(f"memory {str(text)!r} is under 1 MB; did you leave out the GB?")
    return size


def named_device(name: str) -> Device:
    """A device of the table, this machine's `cpu` or `cuda`, or `auto`."""
    key = re.sub(r"[\s_]+|nvidia|geforce|tesla", "", name.lower())
    if key in ("", "auto", "cuda", "gpu") or re.fullmatch(r"cuda:\d+", key):
        index = int(key.partition(":")[2] or 0)
        return this_device("auto" if key in ("", "auto") else "cuda", index=index)
    if key in ("cpu", "mps"):
        return this_device(key)
    if key in DEVICES:
        return DEVICES[key]
    near = get_close_matches(key, DEVICES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: cpu, {', '.join(DEVICES)}"
    raise ConfigError(f"device {name!r} is not in the table; {hint} Or give --memory 24GB.")


def this_device(kind: str = "auto", *, index: int = 0) -> Device:
    """What this machine offers: its CUDA card if it has one, else its processor."""
    card = _cuda_card(index) if kind in ("auto", "cuda") else None
    if kind == "cuda" and card is None:
        raise ConfigError(
            "base.device: no CUDA device found here; name one, as in --device rtx4090"
        )
    if kind == "mps":
        return dataclasses.replace(DEVICES["m2-max"], name="mps", memory_bytes=_ram_total())
    return card or _processor()


@cache
def _cuda_card(index: int) -> Device | None:
    doors = [*Path("/dev").glob("nvidia[0-9]*"), Path("/dev/kfd"), Path("/dev/dxg")]
    if sys.platform.startswith("linux") and not any(door.exists() for door in doors):
        return None  # no driver: spare the import of torch
    import torch

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(index)
    free = torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index)
    flat = re.sub(r"[^a-z0-9]", "", properties.name.lower())
    for name in sorted(DEVICES, key=len, reverse=True):
        if name.partition("-")[0].replace("ti16", "ti") in flat and DEVICES[name].kind == "cuda":
            near = DEVICES[name]
            if abs(near.memory_bytes - properties.total_memory) < 0.15 * near.memory_bytes:
                return dataclasses.replace(near, memory_bytes=free)
    cores = properties.multi_processor_count
    fp32 = cores * 128 * 2 * 1.5e9
    half = 4 * fp32 if properties.major >= 7 else None
    kind: Literal["bfloat16", "float16"] = "bfloat16" if properties.major >= 8 else "float16"
    return Device(properties.name, "cuda", free, 500e9, fp32, half, kind)


def _processor() -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lanes = 1.0  # not Linux: assume AVX2
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        lanes = 1.6 if "avx512f" in flags else 1.0 if "avx2" in flags else 0.5
    speed = (cores or 1) * _CPU_FLOPS_A_CORE * lanes
    return Device("cpu", "cpu", _ram_available(), _CPU_BANDWIDTH, speed)


def resident_bytes() -> int | None:
    """What this process holds in memory now; None where the system does not tell."""
    try:
        return _kilobytes("/proc/self/status", "VmRSS")
    except (OSError, ValueError):
        return None


def _ram_total() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 * GIB


def _ram_available() -> int:
    """Memory this process can have: what it holds and what the kernel and the container leave it."""
    available = _ram_total()
    try:
        mine = _kilobytes("/proc/self/status", "VmRSS")
        available = mine + _kilobytes("/proc/meminfo", "MemAvailable")
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if limit != "max":
            available = min(available, int(limit) - used + mine)
    except (OSError, ValueError):
        pass  # no such files here: what is known so far must do
    return max(available, 2**28)


def _kilobytes(path: str, field: str) -> int:
    """The bytes that a line such as `MemAvailable:  123 kB` names."""
    found = re.search(
        rf"^{field}:\s+(\d+) kB", Path(path).read_text(encoding="utf-8"), re.MULTILINE
    )
    if found is None:
        raise ValueError(f"{path} has no {field}")
    return int(found.group(1)) * 1024
