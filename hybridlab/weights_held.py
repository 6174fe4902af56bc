"""Weights that a process of their own keeps for the next one: started, found, attached to and released."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlab.errors import ConfigError, WeightsError
from hybridlab.weights_holder import MAGIC, MOST_BYTES, REPLY, REQUEST, Verb, user_of

PATIENCE_S = 5.0
"""For an answer of a holder, which has nothing else to do."""
COMMAND = (sys.executable, "-P", "-m", "hybridlab.weights_holder")
CAN_HOLD = sys.platform == "linux"
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FACTS = {"folder": str, "layout": str, "num_bytes": int, "pid": int, "attached": int, "idle_s": float}


@dataclass(frozen=True)
class Held:
    """What a holder says of itself; `idle_left_s` is None while `attached` others use the weights."""

    folder: str
    layout: str
    num_bytes: int
    pid: int
    attached: int
    idle_s: float
    idle_left_s: float | None

    def __str__(self) -> str:
        ends = f"used by {self.attached}" if self.idle_left_s is None else f"ends in {_shown(self.idle_left_s)}"
        return f"{self.folder} in {self.layout}, {self.num_bytes / 1e9:.2f} GB, process {self.pid}, {ends}"


def parse_idle(text: str) -> float:
    """Seconds of "90s", "30m", "2h", "1d" or plain seconds; raises `ConfigError`."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", text.strip(), re.ASCII)
    seconds = float(found[1]) * _UNITS_S[found[2] or "s"] if found else 0.0
    if not 0 < seconds <= 30 * 86400:
        raise ConfigError(f"idle is {text!r:.40}, expected a time such as 90s, 30m or 2h, up to 30d")
    return seconds


def find(folder: Path | str, layout: str) -> Held | None:
    """The holder of a checkpoint's weights in `layout`, if there is one. Raises `WeightsError` if it is not usable."""
    connection = _connect(_name(folder, layout)) if CAN_HOLD else None
    if connection is None:
        return None
    with connection:
        return _ask(connection, Verb.INFO)


def attach(folder: Path | str, layout: str) -> tuple[int, socket.socket, Held] | None:
    """A descriptor of held weights, the lease to keep open as long as they are used, and their holder; None: nobody's.

    What the descriptor holds is not checked here. Raises `WeightsError`.
    """
    connection = _connect(_name(folder, layout)) if CAN_HOLD else None
    if connection is None:
        return None
    descriptors: list[int] = []
    try:
        held = _ask(connection, Verb.ATTACH, descriptors)
        if len(descriptors) != 1:
            raise WeightsError(f"held weights: process {held.pid} sent {len(descriptors)} descriptors, expected 1")
        return descriptors[0], connection, held
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()
        raise


def list_held() -> list[Held]:
    """All holders of this user."""
    found = []
    for name in _names():
        try:
            connection = _connect(name)
            if connection is not None:
                with connection:
                    found.append(_ask(connection, Verb.INFO))
        except WeightsError:
            continue  # ended just now, or of another user
    return sorted(found, key=lambda held: (held.folder, held.layout))


def release(folder: Path | str | None = None) -> list[Held]:
    """End the holders of a checkpoint's weights, or all; returns which. Those who use them go on."""
    wanted = None if folder is None else str(Path(folder).resolve())
    ended = []
    for held in list_held():
        if wanted in (None, held.folder):
            connection = _connect(_name(held.folder, held.layout))
            if connection is not None:
                with connection:
                    ended.append(_ask(connection, Verb.RELEASE))
                    with suppress(OSError):
                        connection.recv(1)  # its end
    return ended


@contextmanager
def claim(folder: Path | str, layout: str) -> Iterator[socket.socket]:
    """The name under which weights are held, before they are there; raises `WeightsError` if somebody has it."""
    if not CAN_HOLD:
        raise WeightsError("weights cannot be held: this system has no abstract sockets")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with server:
        try:
            server.bind("\0" + _name(folder, layout))
        except OSError:
            raise WeightsError(f"weights of {folder} in {layout} are held, or being filled, already") from None
        yield server


def start(server: socket.socket, memory: int, folder: Path | str, layout: str, num_bytes: int, idle_s: float) -> Held:
    """Start the process that keeps `memory`, a descriptor, and answers on `server`; returns once it does."""
    facts = {"folder": str(Path(folder).resolve()), "layout": layout, "num_bytes": num_bytes}
    numbers = (str(memory), str(server.fileno()), str(idle_s))
    process = subprocess.Popen(
        [*COMMAND, *numbers, json.dumps(facts)],
        pass_fds=(memory, server.fileno()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # neither the terminal's end nor its Ctrl-C is meant for it
        cwd="/",
    )
    while process.poll() is None:
        if (held := find(folder, layout)) is not None:
            _STARTED.append(process)
            return held
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    raise WeightsError(f"held weights: the process that should keep them ended with status {process.returncode}")


_STARTED: list[subprocess.Popen[bytes]] = []
"""They outlive this process; kept, so that none is warned about or left as a zombie before."""


def _name(folder: Path | str, layout: str) -> str:
    digest = hashlib.sha256(f"{layout}\0{Path(folder).resolve()}".encode(errors="surrogateescape")).hexdigest()
    return f"{_prefix()}{digest[:32]}"


def _prefix() -> str:
    return f"hybridlab-weights-{os.geteuid()}-"


def _names() -> list[str]:
    """Of all holders: abstract names, which end with their socket and leave no file behind."""
    try:
        lines = Path("/proc/net/unix").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    pattern = re.compile(rf"@({re.escape(_prefix())}[0-9a-f]{{32}})$")
    return sorted({match[1] for line in lines if (match := pattern.search(line))})


def _connect(name: str) -> socket.socket | None:
    """None if nobody answers to `name`; raises `WeightsError` if another user does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(PATIENCE_S)
        connection.connect("\0" + name)
        if (user := user_of(connection)) != os.geteuid():
            raise WeightsError(f"held weights: user {user} answers in their place")
        return connection
    except ConnectionRefusedError:
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise WeightsError(f"held weights: their process does not answer ({error})") from None
    except BaseException:
        connection.close()
        raise


def _ask(connection: socket.socket, verb: Verb, descriptors: list[int] | None = None) -> Held:
    try:
        connection.sendall(REQUEST.pack(MAGIC, verb))
        most = 0 if descriptors is None else 1
        packet, received, _, _ = socket.recv_fds(connection, MOST_BYTES, most)
    except OSError as error:
        raise WeightsError(f"held weights: their process does not answer ({error})") from None
    if descriptors is not None:
        descriptors += received
    for descriptor in received:
        os.set_inheritable(descriptor, False)
    if not packet:
        raise WeightsError("held weights: their process has ended")
    try:
        magic, answered = REPLY.unpack_from(packet)
        if (magic, answered) != (MAGIC, verb):
            raise ValueError(f"{magic!r}, {answered}")
        return _held(json.loads(packet[REPLY.size :]))
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise WeightsError(f"held weights: their process sent what it may not ({error})") from None


def _held(plain: Any) -> Held:
    left_s = plain["idle_left_s"]
    facts = {name: plain[name] for name in _FACTS}
    wrong = [name for name, kind in _FACTS.items() if not isinstance(facts[name], kind)]
    if wrong or not isinstance(left_s, float | None):
        raise ValueError(f"{', '.join(wrong) or 'idle_left_s'} of another type")
    return Held(**facts, idle_left_s=left_s)


def _shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
