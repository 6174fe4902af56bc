"""The process that keeps shared weights for others: `python -m hybridlab.weights_holder MEMORY SOCKET IDLE_S FACTS`.

It maps nothing and imports nothing but the standard library. It gives the descriptor of the memory to processes of the
same user, and ends once nobody has used it for `IDLE_S` seconds. A message is one packet: a magic, a verb, JSON.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

MAGIC = b"hlh1"
REQUEST = struct.Struct("<4sI")
REPLY = struct.Struct("<4sI")
"""What was asked for, or 0: it may not be; JSON follows."""
MOST_BYTES = 65536
MOST_CLIENTS = 256
PEER = struct.Struct("3i")
"""Process, user, group, as SO_PEERCRED gives them."""


class Verb(IntEnum):
    """What a client may ask."""

    INFO = 1
    ATTACH = 2
    """The descriptor comes along, and the connection is a lease from then on: its end says that it is given up."""
    RELEASE = 3


def main(arguments: Sequence[str]) -> int:
    memory, listener, idle_s, facts = int(arguments[0]), int(arguments[1]), float(arguments[2]), arguments[3]
    with socket.socket(fileno=listener) as server:
        Holder(memory, server, idle_s, json.loads(facts)).run()
    return 0


class Holder:
    """Answers one packet after another; a client that sends anything else is cut off."""

    def __init__(self, memory: int, server: socket.socket, idle_s: float, facts: dict[str, Any]) -> None:
        self._memory, self._server, self._idle_s, self._facts = memory, server, idle_s, facts
        self._selector = selectors.DefaultSelector()
        self._clients: set[socket.socket] = set()
        self._attached: set[socket.socket] = set()
        self._idle_since_s = time.monotonic()
        self._released = False

    def run(self) -> None:
        """Until released, or idle for long enough."""
        self._server.listen()
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        while not self._released:
            left_s = None if self._attached else self._idle_left_s()
            if left_s is not None and left_s <= 0:
                return
            for key, _ in self._selector.select(left_s):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._answer(key.fileobj)  # type: ignore[arg-type]

    def _idle_left_s(self) -> float:
        return self._idle_since_s + self._idle_s - time.monotonic()

    def _accept(self) -> None:
        try:
            client, _ = self._server.accept()
        except OSError:
            return
        if user_of(client) != os.geteuid() or len(self._clients) >= MOST_CLIENTS:
            client.close()
            return
        client.setblocking(False)
        self._clients.add(client)
        self._selector.register(client, selectors.EVENT_READ)

    def _answer(self, client: socket.socket) -> None:
        try:
            packet = client.recv(REQUEST.size + 1)
            magic, verb = REQUEST.unpack(packet)
            if magic != MAGIC:
                raise ValueError(magic)
            self._serve(client, Verb(verb))
        except BlockingIOError:
            pass
        except (OSError, ValueError, struct.error):  # gone, or not one of ours
            self._drop(client)

    def _serve(self, client: socket.socket, verb: Verb) -> None:
        if verb is Verb.ATTACH:
            self._attached.add(client)
        body = REPLY.pack(MAGIC, verb) + json.dumps(self._about()).encode()
        socket.send_fds(client, [body], [self._memory] if verb is Verb.ATTACH else [])
        self._released = verb is Verb.RELEASE

    def _about(self) -> dict[str, Any]:
        """`idle_left_s` is None while somebody uses the weights."""
        left_s = None if self._attached else max(0.0, self._idle_left_s())
        times = {"idle_s": self._idle_s, "idle_left_s": left_s}
        return {**self._facts, "pid": os.getpid(), "attached": len(self._attached), **times}

    def _drop(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        self._clients.discard(client)
        if client in self._attached:
            self._attached.discard(client)
            self._idle_since_s = time.monotonic()
        client.close()


def user_of(peer: socket.socket) -> int:
    """The user of the process at the other end."""
    return PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
