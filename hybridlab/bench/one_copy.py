"""How much memory the workers of an engine have mapped, by the kernel's own account: one copy of the weights or two."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlab.engine.shared_weights import NAME
from hybridlab.engine.worker_process import WorkerProcess
from hybridlab.engine.workers import Workers
from hybridlab.errors import ConfigError
from hybridlab.session import Engine

if TYPE_CHECKING:
    import pandas as pd

PACKED = f"/memfd:{NAME}"
PARENT, TOGETHER = "this process", "together"
BOUND = 1.05
"""PSS of the weights, summed over the workers, over their size: what "one copy" allows."""


def one_copy(*engines: Engine) -> pd.DataFrame:
    """A row per worker process of `engines`, of one checkpoint, this process and all together; MB are 1e6 bytes.

    `weights_mb` of the weights' mapping are in memory, `weights_pss_mb` are this process's part of them: each page
    divided by the number of processes that have it mapped. `private_mb` is memory that no other process sees, of the
    weights and of everything else. `copies` is the summed PSS over the size of the weights. Read from
    /proc/PID/smaps. Raises `ConfigError` for an engine without worker processes, or on a system without smaps.
    """
    import pandas as pd

    rows = {}
    size = max(weights_bytes(engine) for engine in engines)
    folder = f" {engines[0].checkpoint.folder.resolve()}/"
    pids = {
        f"{name} {number}" if number else name: pid
        for number, one in enumerate(engines)
        for name, pid in _pids(one).items()
    }
    for name, pid in {**pids, PARENT: os.getpid()}.items():
        weights, other = mapped_bytes(pid, PACKED, folder)
        rows[name] = {
            "weights_mb": weights["Rss"],
            "weights_pss_mb": weights["Pss"],
            "weights_private_mb": private(weights),
            "other_private_mb": private(other),
        }
    table = pd.DataFrame(rows).T / 1e6
    table.loc[TOGETHER] = table.sum()
    table.loc[TOGETHER, "weights_mb"] = size / 1e6
    table["copies"] = [None] * (len(table) - 1) + [table.loc[TOGETHER, "weights_pss_mb"] * 1e6 / size]
    return table


def mapped_bytes(pid: int, *weights_at: str) -> tuple[Counter[str], Counter[str]]:
    """The fields of /proc/`pid`/smaps (Rss, Pss, Private_Clean, ...) in bytes: of the weights, of everything else.

    Weights are the mappings whose path has any of `weights_at` in it, by default packed ones that processes share.
    """
    weights, other = Counter(), Counter()
    into = other
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"/proc/{pid}/smaps: cannot be read ({error.strerror or error})") from None
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            into = weights if any(place in line for place in weights_at or (PACKED,)) else other
        elif field := re.match(r"(\w+): +(\d+) kB", line):
            into[field[1]] += 1024 * int(field[2])
    return weights, other


def private(fields: Counter[str]) -> int:
    """Bytes that no other process sees."""
    return fields["Private_Clean"] + fields["Private_Dirty"]


def weights_bytes(engine: Engine) -> int:
    """Of the files, or as they are packed, by the engine's memory plan."""
    return sum(size for name, size in engine.memory.parts.items() if name.startswith(("weights", "experts")))


def _pids(engine: Engine) -> dict[str, int]:
    runtime = engine.runtime
    found = runtime.pids if isinstance(runtime, Workers) else {}
    if isinstance(runtime, WorkerProcess):
        found = {"worker": runtime.pid}
    pids = {name: pid for name, pid in found.items() if pid is not None}
    if not pids:
        raise ConfigError("one_copy: expected engines with worker processes (workers=..., worker='process')")
    return pids
