"""Where a result comes from: code, strategies, machine, versions and files, as plain data and hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from hybridlab.strategies.sources import Sources

PACKAGE = Path(__file__).resolve().parent
# What draws, prints, predicts or stores cannot change a measurement; strategies are identified one by one.
NOT_MEASURED = (
    *("cli", "widgets", "figures", "strategies", "store", "provenance", "sections", "__main__"),
    *("axes", "device_lock", "experiment", "export", "prediction", "run_costs", "run_files", "strict_yaml"),
    *("summary_table", "sweep_plan"),
)
LIBRARIES = ("numpy", "torch", "jax", "pandas", "pyarrow", "safetensors", "pydantic")


def digest(value: Any, length: int = 12) -> str:
    """Short hexadecimal hash of plain data (or bytes); equal data give equal hashes on every machine."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, allow_nan=False).encode()
    return hashlib.sha256(data).hexdigest()[:length]


@cache
def code_hash() -> str:
    """Hash of the package's Python sources and compiled kernels that can influence a measurement."""
    files = (f for f in PACKAGE.rglob("*") if f.suffix in (".py", ".so") and "__pycache__" not in f.parts)
    return _files_hash(f for f in files if not f.relative_to(PACKAGE).parts[0].startswith(NOT_MEASURED))


def strategy_files_hash(strategy: Any) -> str:
    """Hash of the package files behind a strategy: strategy modules of hybridlab that it is, builds on or uses.

    Empty where there are none: the description of a strategy from elsewhere carries the source.
    """
    found: dict[str, Path] = {}
    pending = [type(strategy).__module__, *sorted(Sources(strategy).modules)]
    while pending:
        name = pending.pop()
        module = sys.modules.get(name)
        if name in found or module is None or not name.startswith("hybridlab.strategies."):
            continue
        found[name] = Path(module.__file__ or "")
        for value in vars(module).values():
            used = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            if isinstance(used, str):
                pending.append(used)
    return _files_hash(found.values()) if found else ""


def file_hash(path: Path) -> str:
    """Hash of a file's whole content."""
    return digest(path.read_bytes())


def checkpoint_hash(folder: Path) -> str:
    """Hash that tells checkpoints apart without reading them whole.

    Takes config.json, and of every safetensors file its name, its size and sixteen 64-KiB samples spread over
    it.
    """
    parts: list[Any] = [file_hash(folder / "config.json")]
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        sampled = hashlib.sha256()
        with path.open("rb") as file:
            for index in range(16):
                file.seek(index * max(0, size - 65536) // 15)
                sampled.update(file.read(65536))
        parts.append([path.name, size, sampled.hexdigest()])
    return digest(parts)


def machine(*, gpu: bool = False) -> dict[str, Any]:
    """What identifies this machine: CPU, cores, kernel tier, memory; with `gpu` its GPUs (imports torch)."""
    from hybridlab import kernels
    from hybridlab.hardware.cores import detect_cores
    from hybridlab.hardware.gpu import detect_gpus
    from hybridlab.hardware.host_memory import detect_host_memory

    cores = detect_cores()
    return {
        "cpu": cores.name,
        "cores": cores.usable,
        "isa": str(kernels.tier()),
        "memory_gib": round(detect_host_memory().usable_bytes / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": [gpu.name for gpu in detect_gpus()] if gpu else [],
    }


@cache
def versions() -> dict[str, str]:
    """Versions of Python, hybridlab and the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in ("hybridlab", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def code_version() -> dict[str, str]:
    """Git commit and, if the tree is dirty, a hash of what differs; the package version outside git."""
    root = PACKAGE.parent
    if _git(root, "ls-files", "--error-unmatch", "hybridlab/provenance.py") is None:
        return {"version": versions().get("hybridlab", "unknown"), "code_hash": code_hash()}
    commit = (_git(root, "rev-parse", "HEAD") or b"").decode().strip()
    result = {"commit": commit or "none", "code_hash": code_hash()}
    untracked = [
        root / name for name in (_git(root, "ls-files", "-o", "--exclude-standard") or b"").decode().split("\n")
    ]
    changes = (_git(root, "diff", "HEAD", "--binary") or b"") + _files_hash(
        f for f in untracked if f.is_file()
    ).encode()
    if (_git(root, "status", "--porcelain") or b"").strip():
        result["dirty"] = digest(changes)
    return result


def _files_hash(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
