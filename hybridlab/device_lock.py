"""One measured run at a time per device, over all processes of the machine: what is timed must not share it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

_POLL_S = 0.2
_EVERYBODY = 0o666  # another user's process waits, too


def lock_folder() -> Path:
    """Where the lock files lie. Not TMPDIR, which differs between processes that have to see each other."""
    return Path("/tmp") if os.name == "posix" else Path(tempfile.gettempdir())


@contextmanager
def alone(device: str | None) -> Iterator[None]:
    """Hold `device` ("cpu") for the time of the block; None holds nothing.

    While another process (or another thread of this one) holds it, say on stderr which, and wait. The kernel takes
    the lock from a process that ends in whatever way. Where no lock can be had at all, warn and go on.
    """
    if device is None:
        yield
        return
    from filelock import Timeout

    lock = _lock(device)
    with ExitStack() as held:
        try:
            try:
                held.enter_context(lock.acquire(timeout=0))
            except Timeout:
                print(f"hybridlab: waiting for the {device}: {_holder(device)}", file=sys.stderr, flush=True)
                held.enter_context(lock.acquire(timeout=-1, poll_interval=_POLL_S))
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(f"{lock.lock_file}: no lock ({reason}); others may measure beside this run", stacklevel=3)
        else:
            _write_note(device)
        yield


@contextmanager
def alone_if_free(device: str) -> Iterator[bool]:
    """Hold `device` for the time of the block if nobody else does; whether that worked."""
    from filelock import Timeout

    with ExitStack() as held:
        try:
            held.enter_context(_lock(device).acquire(timeout=0))
        except (Timeout, OSError):
            free = False
        else:
            free = True
            _write_note(device)
        yield free


def _lock(device: str) -> BaseFileLock:
    from filelock import FileLock

    return FileLock(lock_folder() / f"hybridlab-{device}.lock", mode=_EVERYBODY)


def _note_path(device: str) -> Path:
    return lock_folder() / f"hybridlab-{device}.holder"


def _write_note(device: str) -> None:
    path = _note_path(device)
    text = json.dumps({"pid": os.getpid(), "since": f"{datetime.now():%H:%M:%S}"})
    flags = os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    with suppress(OSError):  # the lock counts; the note only makes the message better
        if not path.exists():
            flags |= os.O_CREAT  # only then: a sticky folder refuses to "create" what another user owns
        descriptor = os.open(path, flags, _EVERYBODY)
        try:
            with suppress(OSError):
                os.chmod(path, _EVERYBODY)
            os.truncate(descriptor, 0)
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def _holder(device: str) -> str:
    try:
        note: Any = json.loads(_note_path(device).read_text(encoding="utf-8"))
        pid, since = int(note["pid"]), str(note["since"])[:8]
    except (OSError, ValueError, KeyError, TypeError):
        return "another process measures on it"
    who = "another run of this process" if pid == os.getpid() else f"process {pid}"
    return f"{who} measures on it since {since}"
