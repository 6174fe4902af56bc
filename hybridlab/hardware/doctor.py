"""`hybridlab doctor`: what was found, what was measured, what is missing and what nobody can test here."""

from __future__ import annotations

import html
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybridlab.hardware.cgroup import cgroup_limits
from hybridlab.hardware.cores import Cores, detect_cores
from hybridlab.hardware.gpu import Gpu, detect_gpus
from hybridlab.hardware.host_memory import HostMemory, detect_host_memory
from hybridlab.hardware.link import LinkProbe, probe_link
from hybridlab.hardware.pinning import Pinning, detect_pinning
from hybridlab.hardware.read_bandwidth import BandwidthProbe, read_bandwidth_gb_s
from hybridlab.weights_held import Held, list_held

_PACKAGES = ("torch", "numpy", "pandas", "safetensors", "tokenizers", "Cython", "jax", "jaxlib")
_ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "sve",
)


@dataclass(frozen=True)
class DoctorReport:
    """Everything that the doctor says; shows as a table in notebooks, `str()` is the same as text."""

    cores: Cores
    cgroup_version: str
    memory: HostMemory
    tier: str
    supported_tiers: tuple[str, ...]
    compiler: str
    """What the compiled kernels were built with; "" if they were not built, "unknown" if they do not say."""
    read_bandwidth: tuple[BandwidthProbe, ...]
    gpus: tuple[Gpu, ...]
    links: tuple[LinkProbe, ...]
    pinning: Pinning
    held: tuple[Held, ...]
    """Weights that processes of their own keep in memory."""
    versions: dict[str, str]
    missing: tuple[str, ...]
    untested: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; sizes in bytes, rates in GB/s."""
        data = asdict(self)
        data["cores"]["flags"] = sorted(f for f in self.cores.flags if f in _ISA_FLAGS)
        return data

    def rows(self) -> list[tuple[str, str]]:
        """(what, finding) in the order in which they are shown."""
        cores, memory = self.cores, self.memory
        quota = "no cgroup quota" if cores.quota is None else f"cgroup quota {cores.quota:g}"
        limit = "no cgroup limit" if memory.limit_bytes is None else f"limit {_gib(memory.limit_bytes)}"
        room = f"{_gib(memory.usable_bytes)} usable, {_gib(memory.available_bytes)} free now"
        flags = " ".join(f for f in _ISA_FLAGS if f in cores.flags) or "not reported"
        nodes = f"{_count(cores.sockets, 'socket')}, {_count(cores.numa_nodes, 'NUMA node')}"
        return [
            ("CPU", cores.name),
            ("extensions", flags),
            ("cores", f"{cores.usable} usable ({cores.affinity} by affinity, {quota})"),
            ("topology", f"{nodes}, {self._l3()}"),
            ("memory", f"{room} ({limit}; cgroup {self.cgroup_version})"),
            ("kernel tier", f"{self.tier} (this machine runs {', '.join(self.supported_tiers)})"),
            ("kernel build", self.compiler or "not built: NumPy computes in their place"),
            *(("memory reads", str(probe)) for probe in self.read_bandwidth),
            *((f"GPU {gpu.index}", f"{gpu.name}, {_gib(gpu.memory_bytes)}") for gpu in self.gpus),
            *((f"link to GPU {link.gpu}", str(link)) for link in self.links),
            ("pinned memory", str(self.pinning)),
            *(("weights held", f"{held} (hybridlab weights release {held.folder})") for held in self.held),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            *(("missing", text) for text in self.missing),
            *(("untested here", text) for text in self.untested),
        ]

    def _l3(self) -> str:
        return "L3 unknown" if self.cores.l3_bytes is None else f"L3 {self.cores.l3_bytes / 2**20:.0f} MiB"

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self.rows()
        )
        return f"<table>{cells}</table>"


def doctor(*, probe: bool = True, gpu: bool = True, repeats: int = 7) -> DoctorReport:
    """Look at this machine.

    Args:
        probe: measure read bandwidth (and the link, with a GPU); takes seconds and 1 GiB or more of memory.
        gpu: ask torch for CUDA devices (imports torch).
        repeats: timed reads per probe.
    """
    from hybridlab import kernels

    limits = cgroup_limits()
    cores = detect_cores(limits=limits)
    gpus = detect_gpus() if gpu else ()
    threads = (1,) if cores.usable == 1 else (1, cores.usable)
    versions = _versions()
    compiler = _compiler()
    return DoctorReport(
        cores=cores,
        cgroup_version=limits.version,
        memory=detect_host_memory(limits=limits),
        tier=kernels.tier(),
        supported_tiers=tuple(kernels.supported_tiers()),
        compiler=compiler,
        read_bandwidth=tuple(read_bandwidth_gb_s(n, repeats=repeats) for n in threads) if probe else (),
        gpus=gpus,
        links=tuple(probe_link(g.index, repeats=repeats) for g in gpus) if probe else (),
        pinning=detect_pinning(gpu=probe and bool(gpus)),
        held=tuple(list_held()),
        versions=versions,
        missing=_missing(versions, bool(compiler), gpus if gpu else None),
        untested=_untested(cores, gpus, set(kernels.TIERS) - set(kernels.supported_tiers())),
    )


def _compiler() -> str:
    """gcc and clang leave their name in what they compile."""
    found = importlib.util.find_spec("hybridlab._kernels")
    if found is None or found.origin is None:
        return ""
    match = re.search(rb"GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+", Path(found.origin).read_bytes())
    return match[0].decode("ascii", "replace") if match else "unknown"


def _versions() -> dict[str, str]:
    found = {"hybridlab": _version("hybridlab"), "python": platform.python_version()}
    found |= {name: _version(name) for name in _PACKAGES}
    return {name: version for name, version in found.items() if version}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _missing(versions: dict[str, str], built: bool, gpus: tuple[Gpu, ...] | None) -> tuple[str, ...]:
    found = []
    if not built:
        found.append("compiled kernels: install with a C compiler to have them")
    if gpus is not None and not gpus:
        found.append("GPU: torch finds no CUDA device, everything runs on the CPU")
    if "tokenizers" not in versions:
        found.append("tokenizers: text prompts cannot be encoded")
    if "jax" not in versions:
        found.append("jax (optional): pip install 'hybridlab[jax]'")
    return tuple(found)


def _untested(cores: Cores, gpus: tuple[Gpu, ...], absent_tiers: Iterable[str]) -> tuple[str, ...]:
    """What this machine cannot show, so that nobody takes a green test run for more than it is."""
    found = [f"kernel tier {name}: this CPU or build cannot run it" for name in sorted(absent_tiers)]
    if not gpus:
        found.append("CUDA: no device")
    elif len(gpus) == 1:
        found.append("more than one GPU")
    if cores.sockets < 2 and cores.numa_nodes < 2:
        found.append("two sockets: memory of another NUMA node")
    found.append("AMX: no kernel uses it" + ("" if "amx_tile" in cores.flags else ", and this CPU lacks it"))
    if sys.platform != "linux":
        found.append("Linux: cgroup limits, affinity and huge pages do not exist here")
    return tuple(found)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
