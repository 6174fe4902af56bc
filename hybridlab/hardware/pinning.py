"""Whether host memory can be pinned for a GPU to copy from by itself: what limits it, and whether CUDA does it."""

from __future__ import annotations

import mmap
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROBE_BYTES = 64 << 20
_LITTLE_BYTES = 2 << 20


@dataclass(frozen=True)
class Pinning:
    """`memlock_bytes` None: no limit, or none that the system tells. `registered` None: not tried, without a GPU."""

    memlock_bytes: int | None
    huge_pages: str
    """Transparent huge pages: "always", "madvise" or "never"; "" if the system does not say."""
    registered: bool | None

    def __str__(self) -> str:
        tried = {
            None: "not tried: no GPU",
            True: f"CUDA pins {PROBE_BYTES >> 20} MiB in place",
            False: f"CUDA refuses to pin {PROBE_BYTES >> 20} MiB",
        }[self.registered]
        limit = "no memlock limit" if self.memlock_bytes is None else f"memlock limit {_size(self.memlock_bytes)}"
        if self.registered and self.memlock_bytes is not None and self.memlock_bytes < PROBE_BYTES:
            limit += " (CUDA does not heed it)"
        pages = {"": "huge pages unknown", "never": "no transparent huge pages"}
        return f"{tried}; {limit}; {pages.get(self.huge_pages, f'transparent huge pages: {self.huge_pages}')}"


def detect_pinning(*, gpu: bool, root: Path = Path("/")) -> Pinning:
    """Ask the system and, with a `gpu`, CUDA; `root` is the file system root, tests pass a folder."""
    return Pinning(_memlock_bytes(), _huge_pages(root), _registers(PROBE_BYTES) if gpu else None)


def pinnable_bytes() -> int | None:
    """What CUDA pins for this process at most; None: as much as there is, or there is no GPU.

    `cudaHostRegister` needs pages that are there, and no more: NVIDIA's kernel module pins them without counting them
    against the memlock limit (os-mlock.c of its open sources). Whether it is so here is found out by pinning a little
    while nothing is allowed; where that fails, the limit is what can be had.
    """
    import torch

    limit = _memlock_bytes()
    if limit is None or not torch.cuda.is_available():
        return None
    if not _registers(_LITTLE_BYTES):
        return 0
    return None if _registers_unallowed() else limit


def _registers_unallowed() -> bool:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
    try:
        return _registers(_LITTLE_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def _memlock_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _huge_pages(root: Path) -> str:
    try:
        text = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else ""


def _registers(num_bytes: int) -> bool:
    import torch

    torch.cuda.init()
    room = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(room.data_ptr(), num_bytes, 0)) != 0:  # type: ignore[union-attr]
        forget_error()
        return False
    runtime.cudaHostUnregister(room.data_ptr())  # type: ignore[union-attr]
    return True


def forget_error() -> None:
    """CUDA keeps an error until it is asked for, and torch asks after the next kernel, whose it is not."""
    import torch

    with suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(1.0)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
