"""A rank as a process: `python -m hybridlab.engine.rank_main DESCRIPTOR PARENT`, started by `ranks_group`.

As `worker_main`, but all ranks are given every step, and each computes its part of it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence

from torch._C._distributed_c10d import FileStore, Store

from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine.channel import Channel, ChannelClosed, Kind, ProtocolError, unpack_json
from hybridlab.engine.program_messages import placement
from hybridlab.engine.ranks_runtime import RankRuntime
from hybridlab.engine.worker_main import PACKAGE, Loop, die_with, send_error
from hybridlab.spec import HardwareSpec, ModelSpec

SETUP_KEYS = {"package", "checkpoint", "hardware", "placement", "options", "store"}


def main(arguments: Sequence[str]) -> int:
    descriptor, parent = map(int, arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    if not die_with(parent):
        return 1
    return serve(channel)


def serve(channel: Channel, store: Store | None = None) -> int:
    """Be a rank until the other end of `channel` closes it; the exit status. Ranks meet in `store`, by default in the
    one that the setup names."""
    try:
        if (ready := _setup(channel, store)) is not None:
            Loop(channel, *ready).run()
    except ChannelClosed:
        pass  # the parent wants nothing more
    except ProtocolError as error:
        send_error(channel, Kind.LOST, error)
        return 1
    return 0


def _setup(channel: Channel, store: Store | None) -> tuple[RankRuntime, ModelSpec] | None:
    kind, body = channel.receive()
    if kind is not Kind.SETUP:
        raise ProtocolError(f"{kind.name} before SETUP")
    given = unpack_json(body)
    if not isinstance(given, dict) or given.keys() != SETUP_KEYS:
        raise ProtocolError(f"a setup of {sorted(given)!r:.200}")
    if given["package"] != PACKAGE:
        raise ProtocolError(f"this rank is hybridlab of {PACKAGE}, its parent that of {given['package']}")
    try:
        checkpoint = open_checkpoint(given["checkpoint"])
        hardware, placed = HardwareSpec(**given["hardware"]), placement(given["placement"])
        store = store or FileStore(f"/proc/self/fd/{given['store']}", given["options"]["num_ranks"])
        runtime = RankRuntime(checkpoint, hardware, placed, store, **given["options"])
    except Exception as error:
        send_error(channel, Kind.FAILED, error)
        return None
    channel.send(Kind.READY)
    return runtime, checkpoint.spec


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of native code may be in the middle of something
