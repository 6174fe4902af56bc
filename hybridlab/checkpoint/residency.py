"""Map a checkpoint's pages ahead of use, since a first touch in the middle of a kernel costs a page fault."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

_MADV_POPULATE_READ = 22  # Linux 5.14
_STEP_BYTES = 2**28  # one call holds the address space's lock: keep it short


def mapped_ranges(files: Iterable[Path]) -> list[tuple[int, int]]:
    """Addresses [first, last) at which this process maps the files; Linux only."""
    names = {str(file.resolve()) for file in files}
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            first, last = (int(address, 16) for address in fields[0].split("-"))
            ranges.append((first, last))
    return ranges


def populate(files: Iterable[Path]) -> bool:
    """Enter the pages of mapped files into this process' page tables; copies nothing.

    Returns False where the system cannot do it (not Linux, or a kernel before 5.14): pages then come on demand.
    """
    return sys.platform == "linux" and populate_ranges(mapped_ranges(files))


def populate_ranges(ranges: Iterable[tuple[int, int]]) -> bool:
    """As `populate`, of addresses [first, last) at multiples of the page size."""
    if sys.platform != "linux":
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for first, last in ranges:
        for start in range(first, last, _STEP_BYTES):
            if madvise(start, min(_STEP_BYTES, last - start), _MADV_POPULATE_READ):
                return False
    return True
