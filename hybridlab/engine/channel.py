"""Messages between a process and its worker: a kind, a length, and bytes whose layout the kind says. No pickle."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
from enum import IntEnum, unique
from typing import Any

MAGIC = b"hlw1"
MOST_BYTES = 2**34
"""Of one message: more is a header that was read at the wrong place."""
_HEADER = struct.Struct("<4sIQ")
_DESCRIPTOR = b"d"
"""The byte that a descriptor travels with."""


@unique
class Kind(IntEnum):
    """What a message is. The worker answers each one of the first group with one of the second."""

    SETUP = 1
    PROGRAM = 2
    """Without an answer: the steps that follow name it."""
    STEP = 3
    LOGITS = 4
    ROUTES = 5
    MOVE = 6
    RANDOMISE = 7
    MAPPED = 8
    TRAFFIC = 9
    """Of ranks alone: what they have sent each other."""
    LEAVE = 10
    TAKE = 11
    """Of workers that share a region (`engine.kv_region`): a request's KV cache goes there, or comes from there."""
    CATCH_UP = 12
    """Of ranks alone: KV blocks that the first one gives the others."""
    PEAK = 13
    """Of a lone worker: what it has had of its GPU."""

    READY = 32
    DONE = 33
    FAILED = 34
    LOST = 35
    """The worker can compute no more, and ends."""

    CHOICE = 64
    """Within a step, from the worker: what a router chose."""
    CHOSEN = 65
    """Its answer: what is to be chosen instead, if anything."""


class ChannelClosed(Exception):
    """The other side has closed its end, or has ended."""


class ProtocolError(Exception):
    """A message that may not be; what follows it cannot be trusted."""


class Channel:
    """One end of a pair of connected stream sockets. With `sentinel`, a process descriptor, its end is noticed too."""

    def __init__(self, end: socket.socket, sentinel: int | None = None) -> None:
        self._socket = end
        self._sentinel = sentinel
        self._poll = None
        if sentinel is not None:
            self._poll = select.poll()
            self._poll.register(end, select.POLLIN)
            self._poll.register(sentinel, select.POLLIN)

    def send(self, kind: Kind, *parts: Any) -> None:
        """`parts` are bytes, or what gives them without a copy; raises `ChannelClosed`."""
        length = sum(memoryview(part).nbytes for part in parts)
        try:
            self._socket.sendall(b"".join((_HEADER.pack(MAGIC, kind, length), *parts)))
        except OSError as error:
            raise ChannelClosed(os.strerror(error.errno or 0)) from None

    def receive(self) -> tuple[Kind, memoryview]:
        """The next message; raises `ChannelClosed`, or `ProtocolError` for what is none."""
        magic, kind, length = _HEADER.unpack(self._read(_HEADER.size))
        if magic != MAGIC or kind not in Kind._value2member_map_ or length > MOST_BYTES:
            raise ProtocolError(f"a header of {bytes(magic)!r}, kind {kind}, {length} bytes")
        return Kind(kind), self._read(length)

    def send_descriptor(self, descriptor: int) -> None:
        """Behind a message that says so: the other side gets a descriptor of the same open file."""
        try:
            socket.send_fds(self._socket, [_DESCRIPTOR], [descriptor])
        except OSError as error:
            raise ChannelClosed(os.strerror(error.errno or 0)) from None

    def receive_descriptor(self) -> int:
        """What `send_descriptor` sent, which the caller then owns; raises as `receive` does."""
        try:
            if self._poll is not None:
                self._await()
            body, descriptors, _, _ = socket.recv_fds(self._socket, len(_DESCRIPTOR), 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise ChannelClosed(os.strerror(error.errno or 0)) from None
        if not body:
            raise ChannelClosed("the other side has closed the connection")
        if body != _DESCRIPTOR or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ProtocolError(f"{body!r} with {len(descriptors)} descriptors, expected one")
        return descriptors[0]

    def close(self) -> None:
        self._socket.close()

    def _read(self, length: int) -> memoryview:
        buffer = memoryview(bytearray(length))
        done = 0
        while done < length:
            try:
                if self._poll is not None:
                    self._await()
                count = self._socket.recv_into(buffer[done:])
            except OSError as error:
                raise ChannelClosed(os.strerror(error.errno or 0)) from None
            if count == 0:
                raise ChannelClosed("the other side has closed the connection")
            done += count
        return buffer

    def _await(self) -> None:
        """Until there is something to read; what a process sent before its end is still read."""
        assert self._poll is not None
        ready = dict(self._poll.poll())
        if self._socket.fileno() not in ready:
            raise ChannelClosed("the other side has ended")


def pack_json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def unpack_json(body: memoryview) -> Any:
    """Raises `ProtocolError` for bytes that are no JSON."""
    try:
        return json.loads(bytes(body))
    except ValueError as error:
        raise ProtocolError(f"a message that is no JSON: {error}") from None
