"""Named files of a folder or a tar archive (plain or gzip), read in memory within limits; nothing is unpacked."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hybridlab.errors import ConfigError
from hybridlab.workload.reading import GZIP_MAGIC, file_hash

MAX_MEMBERS = 20_000
MAX_MEMBER_BYTES = 64 * 2**20
MAX_KEPT_BYTES = 256 * 2**20
MAX_ARCHIVE_BYTES = 2**30
"""After unpacking, members that are not asked for included."""


def read_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted regular files of a folder (by file name) or of a tar archive (by name in the archive), sorted.

    Links, devices and folders in an archive are passed over. Raises ConfigError naming archive and member.
    """
    try:
        found = _from_folder(path, wanted) if path.is_dir() else _from_tar(path, wanted)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: not a whole tar archive ({error})") from None
    except OSError as error:
        raise ConfigError(f"workload.path: {path}: cannot be read ({error.strerror or error})") from None
    return dict(sorted(found.items()))


def members_hash(path: Path, wanted: Callable[[str], bool]) -> str:
    """Hash of an archive, or of the names and the content of a folder's wanted files."""
    if not path.is_dir():
        return file_hash(path)
    total = hashlib.sha256()
    for name, content in read_members(path, wanted).items():
        total.update(f"{name}\0".encode() + hashlib.sha256(content).digest())
    return total.hexdigest()[:12]


def _from_folder(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    kept = 0
    for file in path.iterdir():
        if wanted(file.name) and file.is_file():
            kept += _size(path, file.name, file.stat().st_size)
            _check_kept(path, kept)
            found[file.name] = file.read_bytes()
    return found


def _from_tar(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    if path.exists() and not path.is_file():
        raise ConfigError(f"workload.path: {path}: cannot be read (neither a file nor a folder)")
    found: dict[str, bytes] = {}
    kept = 0
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        content = _Limited(path, gzip.GzipFile(fileobj=raw) if packed else raw)
        # "r|": from front to back, so that no claim of a size is believed before as much has been read.
        with tarfile.open(fileobj=content, mode="r|") as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
            for number, member in enumerate(archive):
                if number >= MAX_MEMBERS:
                    raise ConfigError(f"{path}: more than {MAX_MEMBERS:,} members")
                if not (member.isreg() and wanted(member.name)):
                    continue
                if member.name in found:
                    raise ConfigError(f"{path}: {member.name}: is there twice")
                kept += _size(path, member.name, member.size)
                _check_kept(path, kept)
                file = archive.extractfile(member)
                found[member.name] = file.read() if file else b""
    return found


def _size(path: Path, name: str, size: int) -> int:
    if size > MAX_MEMBER_BYTES:
        raise ConfigError(f"{path}: {name}: {size:,} bytes; expected at most {MAX_MEMBER_BYTES:,}")
    return size


def _check_kept(path: Path, kept: int) -> None:
    if kept > MAX_KEPT_BYTES:
        raise ConfigError(f"{path}: more than {MAX_KEPT_BYTES:,} bytes of clients")


class _Limited:
    """A stream that refuses to give more than MAX_ARCHIVE_BYTES."""

    def __init__(self, path: Path, file: BinaryIO | gzip.GzipFile) -> None:
        self._path, self._file, self._given = path, file, 0

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._given += len(content)
        if self._given > MAX_ARCHIVE_BYTES:
            raise ConfigError(f"{self._path}: unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes")
        return content
