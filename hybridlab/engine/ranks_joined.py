"""Ranks that torchrun has started, on one host or several: the first one leads, the others follow it.

The leader listens on one network interface, loopback unless the user names another; where is told through the store in
which all meet, with a word that a follower must know. That store is torchrun's own, or the leader's where processes
have torchrun's variables from somebody else.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from hybridlab.engine.channel import Channel
from hybridlab.engine.child import GRACE_S
from hybridlab.engine.rank_main import serve
from hybridlab.errors import ConfigError, WorkerLost

JOIN_S = 300.0
"""How long ranks wait for each other at the start."""
HELLO_S = 10.0
"""How long one that has connected has to say who it is; it does so at once."""
_HELLO = struct.Struct("<32sI")
_SIOCGIFADDR = 0x8915


class Joined:
    """`ranks_group.Starter` over the ranks of this torchrun; raises `ConfigError` outside of one."""

    store: int | None = None

    def __init__(self, interface: str) -> None:
        try:
            store, self.rank, self.size = _meet(interface)
        except ValueError as error:
            raise ConfigError(f"ranks is 'torchrun', but this is not a process of torchrun: {error}") from None
        self._store, self._interface = PrefixStore("hybridlab", store), interface
        self._members: dict[int, _Member] = {}
        self._lock = threading.Lock()

    def follow(self) -> NoReturn:
        """Be a rank until the leader is done, and end this process."""
        where, word = self._store.get("leader").decode().split()
        host, _, port = where.rpartition(":")
        try:
            connection = socket.create_connection((host, int(port)), timeout=JOIN_S)
        except OSError as error:
            raise WorkerLost(f"rank {self.rank} does not reach rank 0 at {where}: {error}") from None
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(_HELLO.pack(word.encode(), self.rank))
        status = serve(Channel(connection), self._store)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads of native code may be in the middle of something

    def start(self, rank: int) -> _Member:
        with self._lock:
            if not self._members:
                self._members = self._gather()
        return self._members[rank]

    def again(self) -> None:
        """Processes that have ended are torchrun's to start again, all of them."""

    def close(self) -> None:
        """Nothing is held beyond the connections."""

    def _gather(self) -> dict[int, _Member]:
        ours, theirs = socket.socketpair()
        own = threading.Thread(target=serve, args=(Channel(theirs), self._store), name="hybridlab-rank-0", daemon=True)
        own.start()
        found = {0: (mine := _Member(ours, own))}
        atexit.register(mine.end)
        word = secrets.token_hex(16)
        with socket.create_server((address_of(self._interface), 0), backlog=self.size) as server:
            host, port = server.getsockname()
            server.settimeout(JOIN_S)
            self._store.set("leader", f"{host}:{port} {word}")
            while len(found) < self.size:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(self.size)) - found.keys())
                    raise WorkerLost(f"rank {missing[0]} of {self.size} did not join within {JOIN_S:g} s") from None
                connection.settimeout(HELLO_S)
                hello = b""
                with contextlib.suppress(OSError):  # a stranger that says nothing, or breaks off
                    hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
                said, rank = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (b"", 0)
                if not secrets.compare_digest(said, word.encode()) or not 0 < rank < self.size or rank in found:
                    connection.close()
                    continue
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                found[rank] = _Member(connection)
        return found


class _Member:
    """A rank at the other end of a connection: that it ends is seen there alone."""

    pid = 0

    def __init__(self, connection: socket.socket, thread: threading.Thread | None = None) -> None:
        self._connection, self._thread = connection, thread
        self.channel = Channel(connection)

    def on_end(self, function: Callable[[Any], None]) -> None:
        """Noticed by who reads next."""

    def was_killed(self) -> bool:
        return False

    def how_it_ended(self) -> str:
        return "its connection was closed"

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.channel.close()
        if self._thread is not None:
            self._thread.join(GRACE_S)

    def end(self) -> None:
        """Before the interpreter does: native threads of a rank that lives on would abort it."""
        self.kill()
        if self._thread is not None:
            self._thread.join(GRACE_S)


def _meet(interface: str) -> tuple[Store, int, int]:
    """The store in which all ranks meet, this one's rank, and how many there are; raises `ValueError` without them."""
    given, timeout = os.environ, timedelta(seconds=JOIN_S)
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if (
        given.get("RANK") != "0"
        or given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        or not all(map(given.get, names))
    ):
        return next(iter(rendezvous("env://", timeout=timeout)))
    # Torch would have this store listen on all interfaces.
    _, size, host, port = (given[name] for name in names)
    own = address_of(interface)
    try:
        if socket.gethostbyname(host) != own:
            raise ConfigError(
                f"MASTER_ADDR is {host!r}, expected {own}, the address of interface {interface!r} of rank 0"
            )
        server = socket.create_server((own, int(port)), backlog=int(size))
    except OSError as error:  # a name that nobody knows, a port that somebody has
        raise ConfigError(f"MASTER_ADDR is {host!r}, MASTER_PORT {port!r}, where none can listen: {error}") from None
    store = TCPStore(own, int(port), int(size), True, timeout, wait_for_workers=False, master_listen_fd=server.detach())
    return store, 0, int(size)


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface; raises `ConfigError` if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            found = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(f"interface {interface!r} has no address ({error}); this machine has {names}") from None
    return socket.inet_ntoa(found[20:24])
