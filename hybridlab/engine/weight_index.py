"""What a memory of shared weights holds and of which checkpoint: written before them, checked by who attaches.

A header (magic, format, length and SHA-256 of the index), the index as JSON, then the weights from a multiple of 2 MiB.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hybridlab.checkpoint import Checkpoint
from hybridlab.errors import WeightsError

MAGIC = b"hlshare\0"
FORMAT = 1
"""Of the index and of what the layouts' bytes mean: a change of either is another number."""
ALIGNMENT = 64
HUGE_PAGE = 2**21
_HEADER = struct.Struct("<8sII32s")


@dataclass(frozen=True)
class WeightIndex:
    """`sizes` bytes by name, laid out in this order; `files` (size, modification time in ns) of the checkpoint's.

    Two are equal if and only if they stand for the same bytes.
    """

    layout: str
    files: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, int]

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Name -> (first byte, last byte + 1) in the memory."""
        found, at = {}, self.head_bytes
        for name, size in self.sizes.items():
            found[name] = (at, at + size)
            at = _round_up(at + size, ALIGNMENT)
        return found

    @cached_property
    def num_bytes(self) -> int:
        """Of the whole memory."""
        return _round_up(max([self.head_bytes, *(end for _, end in self.places.values())]), HUGE_PAGE)

    def written(self) -> bytes:
        """Header and index: the first bytes of the memory."""
        return _HEADER.pack(MAGIC, FORMAT, len(self._text), hashlib.sha256(self._text).digest()) + self._text

    @cached_property
    def head_bytes(self) -> int:
        """What lies before the first weight: all that `check` reads."""
        return _round_up(_HEADER.size + len(self._text), HUGE_PAGE)

    def check(self, memory: memoryview, num_bytes: int | None = None) -> None:
        """Raises `WeightsError`, naming what differs, unless `memory` begins with this index.

        `num_bytes` is how long it is, where `memory` is its first `head_bytes` alone.
        """
        found = _read(memory)
        if found.layout != self.layout:
            raise WeightsError(f"shared weights: they are in layout {found.layout!r}, expected {self.layout!r}")
        for name in {**self.files, **found.files}:
            mine, theirs = self.files.get(name), found.files.get(name)
            if mine != theirs:
                told = [f"{x[0]:,} bytes of {x[1]} ns" if x else "no such file" for x in (theirs, mine)]
                raise WeightsError(
                    f"shared weights: file {name} of the checkpoint has changed since ({told[0]}, now {told[1]})"
                )
        if found.sizes != self.sizes:
            names = {**self.sizes, **found.sizes}
            name = next((n for n in names if self.sizes.get(n) != found.sizes.get(n)), "")
            what = f"{name} has {found.sizes.get(name)} bytes, expected {self.sizes.get(name)}"
            raise WeightsError(f"shared weights: {what if name else 'the order of the weights differs'}")
        if list(found.sizes) != list(self.sizes):
            raise WeightsError("shared weights: the weights lie in another order than expected")
        if (length := len(memory) if num_bytes is None else num_bytes) != self.num_bytes:
            raise WeightsError(f"shared weights: {length:,} bytes, expected {self.num_bytes:,}")

    @cached_property
    def _text(self) -> bytes:
        plain = {"layout": self.layout, "files": self.files, "sizes": self.sizes}
        return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()


def files_of(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """The weight files and config.json: (size, modification time in ns) by name."""
    found = {}
    for path in (checkpoint.folder / "config.json", *checkpoint.files):
        known = Path(path).stat()
        found[path.name] = (known.st_size, known.st_mtime_ns)
    return found


def _read(memory: memoryview) -> WeightIndex:
    if len(memory) < _HEADER.size:
        raise WeightsError(f"shared weights: {len(memory)} bytes hold no index")
    magic, version, length, digest = _HEADER.unpack(memory[: _HEADER.size])
    if magic != MAGIC:
        raise WeightsError(f"shared weights: they begin with {magic!r}, expected {MAGIC!r}")
    if version != FORMAT:
        raise WeightsError(f"shared weights: their index has format {version}, expected {FORMAT}")
    text = bytes(memory[_HEADER.size : _HEADER.size + length])
    if len(text) != length or hashlib.sha256(text).digest() != digest:
        raise WeightsError("shared weights: their index is damaged (its checksum differs)")
    try:
        return _index(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise WeightsError("shared weights: their index is damaged (it is no index)") from None


def _index(plain: Any) -> WeightIndex:
    files = {str(name): (int(size), int(time)) for name, (size, time) in plain["files"].items()}
    return WeightIndex(str(plain["layout"]), files, {str(name): int(size) for name, size in plain["sizes"].items()})


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
