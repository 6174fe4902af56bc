"""The workers that `hl.load` is asked for, checked, and what of cores and GPU memory each of them gets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hybridlab.engine.memory import GIB
from hybridlab.engine.options import check_numbers
from hybridlab.errors import ConfigError
from hybridlab.hardware.gpu import Gpu

PREFILL, DECODE = "prefill", "decode"
MOST_WORKERS = 8
GPU_RESERVE_BYTES = GIB
"""Of a GPU's memory that workers leave alone: the driver's own, and what others have on it."""
_KEYS = ("threads", "kv_tokens")
_GPU_KEYS = (*_KEYS, "gpu", "vram_gb")
WorkerOptions = dict[str, dict[str, Any]]


def is_prefill(name: str) -> bool:
    """Whether the worker of that name computes prompts for others."""
    return name.startswith(PREFILL)


def check_workers(
    workers: Any, threads: int, device: str, *, unused: Mapping[str, Any], in_files: bool
) -> WorkerOptions | None:
    """Name -> threads and kv_tokens of each worker, threads shared out evenly unless given; None without `workers`.

    On device "cuda" also `gpu`, the index of its GPU, and `vram_gb`, None where it is not given. Raises `ConfigError`
    naming what cannot be; `unused` are options that do not go with workers, None unless set.
    """
    if workers is None:
        return None
    wanted = "{'prefill': {'threads': 1}, 'decode': {'threads': 1}}"
    if not isinstance(workers, Mapping) or not all(isinstance(own, Mapping) for own in workers.values()):
        raise ConfigError(f"workers is {workers!r:.80}, expected for example {wanted}")
    names = list(workers)
    kinds = [kind for name in names for kind in (PREFILL, DECODE) if isinstance(name, str) and name.startswith(kind)]
    if len(kinds) != len(names) or set(kinds) != {PREFILL, DECODE} or len(names) > MOST_WORKERS:
        raise ConfigError(
            f"workers has {names!r:.80}, expected 2 to {MOST_WORKERS} names that begin with 'prefill' or 'decode', at "
            f"least one of each, for example {wanted}"
        )
    for option, value in unused.items():
        if value is not None:
            raise ConfigError(f"{option} is {value!r}, which does not go with workers")
    if not in_files:
        raise ConfigError("workers need the folder of a checkpoint to open, not an opened one")
    checked: WorkerOptions = {}
    counts, known = ("threads", "kv_tokens"), _GPU_KEYS if device == "cuda" else _KEYS
    for name, own in workers.items():
        if strange := sorted(map(str, own.keys() - set(known))):
            on_gpus = "" if device == "cuda" or strange[0] not in _GPU_KEYS else f" on device {device!r}"
            raise ConfigError(f"workers.{name} has {strange[0]!r}, expected {_listed(known)}{on_gpus}")
        numbers, sizes = {key: own.get(key) for key in counts}, {"vram_gb": own.get("vram_gb")}
        check_numbers(*({f"workers.{name}.{key}": value for key, value in given.items()} for given in (numbers, sizes)))
        most = 4 * (os.cpu_count() or 1)
        least = 2 if device == "emulated" else 1
        own_threads = own.get("threads") or max(least, threads // len(workers))
        if not least <= own_threads <= most:
            raise ConfigError(
                f"workers.{name}.threads is {own_threads}, expected {least} to {most} on device {device!r}"
            )
        checked[name] = {"threads": own_threads, "kv_tokens": own.get("kv_tokens")}
        if device == "cuda":
            checked[name] |= {"gpu": own.get("gpu") or 0, "vram_gb": own.get("vram_gb")}
    return checked


def share_cores(threads: Mapping[str, int], cores: Sequence[int] | None = None) -> dict[str, list[int]]:
    """The cores of each worker, each of one alone; [] for all if there are fewer than threads: they take turns then."""
    left = sorted(os.sched_getaffinity(0)) if cores is None else list(cores)
    if sum(threads.values()) > len(left):
        return {name: [] for name in threads}
    found = {}
    for name, count in threads.items():
        found[name], left = left[:count], left[count:]
    return found


def share_gpus(workers: WorkerOptions, gpus: Sequence[Gpu], vram_gb: float | None) -> dict[str, int]:
    """Bytes of its GPU that each worker of `check_workers` may take, contexts included.

    What is not given is shared out evenly among those of one GPU, of which all take at most `vram_gb` (1e9 bytes)
    together. Raises `ConfigError` for a GPU that is not there, or more than it has.
    """
    shares: dict[str, int] = {}
    for name, own in workers.items():
        if own["gpu"] not in range(len(gpus)) or isinstance(own["gpu"], bool):
            raise ConfigError(
                f"workers.{name}.gpu is {own['gpu']!r}, expected an index from 0 to {len(gpus) - 1}: torch finds "
                f"{len(gpus)} of them"
            )
    for gpu in gpus:
        here = {name: own["vram_gb"] for name, own in workers.items() if own["gpu"] == gpu.index}
        room = gpu.memory_bytes - GPU_RESERVE_BYTES
        if vram_gb is not None:
            room = min(room, int(vram_gb * 1e9))
        given = {name: int(own * 1e9) for name, own in here.items() if own is not None}
        open_, left = len(here) - len(given), room - sum(given.values())
        if here and (left < 0 or (open_ and left < open_ * GIB)):
            raise ConfigError(
                f"workers {', '.join(here)} share GPU {gpu.index} with {room / 1e9:.1f} GB for them, and their vram_gb "
                f"add up to {sum(given.values()) / 1e9:.1f} GB; expected no more"
                + (", and some GB for those without vram_gb" if open_ else "")
            )
        shares |= {name: given.get(name, left // max(1, open_)) for name in here}
    return {name: shares[name] for name in workers}


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
