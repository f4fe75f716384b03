"""What a number was measured on: processor, caches, memory, GPU; and a folder name for it."""

import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512vbmi", "amx_int8", "amx_bf16")
"""Processor flags that decide which kernels run."""

_VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
_BRANDS = ("epyc", "threadripper", "ryzen", "xeon", "core", "atom")
_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Machine:
    """Where a figure comes from.

    Attributes:
        cpu: the processor's own name.
        vendor: ``amd``, ``intel``, or the architecture.
        family: x86 family, -1 if unknown.
        model: x86 model, -1 if unknown.
        num_cores: logical cores.
        flags: those of :data:`FLAGS` that it has.
        last_level_cache_bytes: 0 if unknown.
        memory_bytes: main memory.
        gpu: name of the first CUDA device, if there is one.
    """

    cpu: str
    vendor: str
    family: int
    model: int
    num_cores: int
    flags: tuple[str, ...]
    last_level_cache_bytes: int
    memory_bytes: int
    gpu: str | None = None

    @property
    def slug(self) -> str:
        """A name for ``benchmarks/results/<machine>``, such as ``amd-epyc-zen5-2-cores``."""
        if self.gpu is not None:
            return _to_slug(self.gpu)
        brand = next((word for word in _BRANDS if re.search(rf"\b{word}\b", self.cpu.lower())), "")
        return _to_slug(f"{self.vendor} {brand} {self._generation} {self.num_cores} cores")

    @property
    def _generation(self) -> str:
        if self.vendor == "amd":
            return amd_generation(self.family, self.model)
        widest = (("amx_int8", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"))
        return next((name for flag, name in widest if flag in self.flags), "")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the slug, JSON-ready."""
        return {"slug": self.slug, **asdict(self), "flags": list(self.flags)}


def describe_machine() -> Machine:
    """Look at the machine that this runs on."""
    info = parse_cpuinfo(_read(_CPUINFO))
    flags = set(info.get("flags", "").split())
    return Machine(
        cpu=info.get("model name", platform.processor() or platform.machine()),
        vendor=_VENDORS.get(info.get("vendor_id", ""), platform.machine()),
        family=int(info.get("cpu family", -1)),
        model=int(info.get("model", -1)),
        num_cores=os.cpu_count() or 1,
        flags=tuple(flag for flag in FLAGS if flag in flags),
        last_level_cache_bytes=last_level_cache_bytes() or 0,
        memory_bytes=psutil.virtual_memory().total,
        gpu=_gpu_name(),
    )


def parse_cpuinfo(text: str) -> dict[str, str]:
    """Return the entries of the first processor in the text of ``/proc/cpuinfo``."""
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def amd_generation(family: int, model: int) -> str:
    """Return ``zen`` to ``zen5`` from an AMD processor's family and model, ``""`` for others.

    Families 23 and 25 hold two generations each, told apart by the model (AMD's revision guides).
    """
    if family == 23:
        return "zen2" if model >= 0x30 else "zen"
    if family == 25:
        is_zen4 = 0x10 <= model <= 0x1F or 0x60 <= model <= 0x7F or 0xA0 <= model <= 0xAF
        return "zen4" if is_zen4 else "zen3"
    return "zen5" if family == 26 else ""


def last_level_cache_bytes(caches: Path = _CACHES) -> int | None:
    """Return the size of the first core's largest cache; ``None`` if the system does not tell."""
    sizes = [parse_cache_size(_read(path)) for path in caches.glob("index*/size")]
    return max(sizes, default=0) or None


def parse_cache_size(text: str) -> int:
    """Read ``32768K`` or ``32M`` as bytes; 0 if it is neither."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(match[1]) * _SIZE_UNITS[match[2]] if match else 0


def _gpu_name() -> str | None:
    """Ask torch if the benchmark uses it; a benchmark without torch has no GPU figures."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name(0))


def _to_slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
