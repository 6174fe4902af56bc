"""One copy of the weights for several processes: a sealed memfd, filled once, which all map read-only.

It has no name in any file system: its memory goes with the last process that holds it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from hybridlab.checkpoint.residency import populate_ranges
from hybridlab.engine.weight_index import HUGE_PAGE, WeightIndex
from hybridlab.errors import WeightsError

if sys.platform != "win32":
    import fcntl

NAME = "hybridlab-weights"
"""As /proc/PID/maps shows it."""
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; not in `fcntl` yet
Write = Callable[[str, np.ndarray], None]
"""(a name of the index, its bytes to fill: uint8, flat)."""


class MappedWeights:
    """A process' view of shared weights: `weights[name]` is uint8, flat, read-only."""

    def __init__(self, memory: mmap.mmap, index: WeightIndex) -> None:
        self.whole = np.frombuffer(memory, np.uint8)
        self.weights: Mapping[str, np.ndarray] = {name: self.whole[a:b] for name, (a, b) in index.places.items()}

    def populate(self) -> bool:
        """Enter all pages into this process' page tables; False where the system cannot do it."""
        first = self.whole.ctypes.data
        return populate_ranges([(first, first + self.whole.nbytes)])


class SharedWeights:
    """A memfd for the weights of one checkpoint in one layout, owned by its descriptor `fileno()`.

    Whoever opens it first fills and seals it; a lock of the file makes others wait, and goes with a process that is
    killed over it. `lease` is a socket whose end tells a holder that these weights are no longer used.
    """

    def __init__(self, descriptor: int, lease: socket.socket | None = None) -> None:
        self._descriptor, self._lease = descriptor, lease
        self._finalizer = weakref.finalize(self, _close, descriptor, lease)

    @classmethod
    def create(cls, index: WeightIndex) -> SharedWeights:
        """Room for what `index` names, of which nothing is allocated yet. Raises `WeightsError` where it cannot be."""
        if sys.platform != "linux":
            raise WeightsError("weights cannot be shared: this system has no memfd")
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        try:
            _probe_seal(flags)
            descriptor = _huge(flags, index.num_bytes)
            if descriptor is None:
                descriptor = os.memfd_create(NAME, flags)
                os.ftruncate(descriptor, index.num_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError as error:
            raise WeightsError(f"weights cannot be shared: memfd, {error.strerror}") from None
        return cls(descriptor)

    def fileno(self) -> int:
        return self._descriptor

    @property
    def seal(self) -> str:
        """What keeps others from writing: "write", "future write" or, before they are filled, ""."""
        seals = fcntl.fcntl(self._descriptor, fcntl.F_GET_SEALS)
        return "write" if seals & fcntl.F_SEAL_WRITE else "future write" if seals & _F_SEAL_FUTURE_WRITE else ""

    @property
    def resident_bytes(self) -> int:
        """Memory that is taken already: all of it once it is filled."""
        return os.fstat(self._descriptor).st_size if self.seal else 0

    def duplicate(self) -> SharedWeights:
        """Another owner of the same memory, and of the lease."""
        lease = None if self._lease is None else self._lease.dup()
        return SharedWeights(os.dup(self._descriptor), lease)

    def open(self, index: WeightIndex, write: Write, *, threads: int, progress: bool = False) -> MappedWeights:
        """Map the weights, after filling them by `write` in parallel if nobody has.

        Raises `WeightsError`, naming what differs, if they are not those of `index`.
        """
        if not self.seal:
            with self._alone() as descriptor:
                if not self.seal:
                    _fill(descriptor, index, write, threads, progress)
                    _seal(descriptor)
        return self.attach(index)

    def attach(self, index: WeightIndex) -> MappedWeights:
        """Map weights that are filled and sealed. Raises `WeightsError` if they are not, or not those of `index`."""
        if not self.seal:
            raise WeightsError("shared weights: nobody has filled and sealed them")
        # By a descriptor that cannot write: before Linux 6.7, F_SEAL_WRITE refuses even to read through others.
        descriptor = self._opened_anew(os.O_RDONLY)
        try:
            memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise WeightsError(f"shared weights: they cannot be mapped ({error})") from None
        finally:
            os.close(descriptor)
        with memoryview(memory) as view:
            index.check(view)
        _advise(memory)
        return MappedWeights(memory, index)

    def close(self) -> None:
        """Give up the descriptor and the lease; what is mapped stays mapped. Idempotent."""
        self._finalizer()

    def __enter__(self) -> SharedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _alone(self) -> Iterator[int]:
        # Opened anew: processes that inherited one descriptor would share its lock.
        descriptor = self._opened_anew(os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _opened_anew(self, flags: int) -> int:
        try:
            return os.open(f"/proc/self/fd/{self._descriptor}", flags | os.O_CLOEXEC)
        except OSError as error:
            raise WeightsError(f"shared weights: they cannot be opened by /proc ({error.strerror})") from None


def huge_pages() -> str:
    """What the system says of huge pages for shared memory: "always", "advise", "never", ...; "" if nothing."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text(encoding="ascii")
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]


def _huge(flags: int, num_bytes: int) -> int | None:
    """A memfd of reserved huge pages, if there are enough of them; else None."""
    if _free_huge_bytes() < num_bytes:
        return None
    try:
        descriptor = os.memfd_create(NAME, flags | os.MFD_HUGETLB)
    except OSError:
        return None
    try:
        os.ftruncate(descriptor, num_bytes)
        mmap.mmap(descriptor, num_bytes).close()  # reserves the pages, or fails
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _free_huge_bytes() -> int:
    found = {}
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name in ("HugePages_Free", "HugePages_Rsvd", "Hugepagesize"):
                found[name] = int(rest.split()[0])
    if len(found) < 3 or found["Hugepagesize"] * 1024 != HUGE_PAGE:
        return 0
    return (found["HugePages_Free"] - found["HugePages_Rsvd"]) * HUGE_PAGE


def _fill(descriptor: int, index: WeightIndex, write: Write, threads: int, progress: bool) -> None:
    if (size := os.fstat(descriptor).st_size) != index.num_bytes:
        raise WeightsError(f"shared weights: room for {size:,} bytes, expected {index.num_bytes:,}")
    memory = mmap.mmap(descriptor, size)
    _advise(memory)
    _write_all(np.frombuffer(memory, np.uint8), index, write, threads, progress)
    memory.close()  # what is mapped for writing cannot be sealed


def _write_all(whole: np.ndarray, index: WeightIndex, write: Write, threads: int, progress: bool) -> None:
    from tqdm.auto import tqdm

    def fill(name: str) -> int:
        first, end = index.places[name]
        write(name, whole[first:end])
        return end - first

    total = sum(index.sizes.values())
    bar = tqdm(total=total, desc="share weights", unit="B", unit_scale=True, disable=not progress)
    with bar, ThreadPoolExecutor(threads, "hybridlab-share") as pool:
        for done in pool.map(fill, index.sizes):
            bar.update(done)
    head = index.written()
    whole[: len(head)] = np.frombuffer(head, np.uint8)


def _probe_seal(flags: int) -> None:
    """Raises `WeightsError` before anything is filled in vain."""
    descriptor = os.memfd_create(NAME, flags)
    try:
        _seal(descriptor)
    finally:
        os.close(descriptor)


def _seal(descriptor: int) -> None:
    for seal in (fcntl.F_SEAL_WRITE, _F_SEAL_FUTURE_WRITE):
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seal | fcntl.F_SEAL_SEAL)
            return
        except OSError:
            continue
    raise WeightsError("weights cannot be shared: this kernel does not seal a memfd")


def _advise(memory: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)


def _close(descriptor: int, lease: socket.socket | None) -> None:
    os.close(descriptor)
    if lease is not None:
        lease.close()
