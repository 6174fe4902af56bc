"""A rank as a process: `python -m hybridlab.engine.rank_main DESCRIPTOR PARENT`, started by `ranks_group`.

As `worker_main`, but all ranks are given every step, and each computes its part of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from torch._C._distributed_c10d import FileStore, Store

from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import worker_main
from hybridlab.engine.channel import Channel, Kind
from hybridlab.engine.program_messages import placement
from hybridlab.engine.ranks_runtime import RankRuntime
from hybridlab.spec import HardwareSpec, ModelSpec

SETUP_KEYS = {"package", "checkpoint", "hardware", "placement", "options", "store"}


def main(arguments: Sequence[str]) -> int:
    channel = worker_main.channel_of(arguments)
    return 1 if channel is None else serve(channel)


def serve(channel: Channel, store: Store | None = None) -> int:
    """Be a rank until the other end of `channel` closes it; the exit status. Ranks meet in `store`, by default in the
    one that the setup names."""
    return worker_main.serve(channel, lambda channel: _setup(channel, store))


def _setup(channel: Channel, store: Store | None) -> tuple[RankRuntime, ModelSpec] | None:
    given = worker_main.first_message(channel, "rank", SETUP_KEYS)
    try:
        checkpoint = open_checkpoint(given["checkpoint"])
        hardware, placed = HardwareSpec(**given["hardware"]), placement(given["placement"])
        store = store or FileStore(f"/proc/self/fd/{given['store']}", given["options"]["num_ranks"])
        runtime = RankRuntime(checkpoint, hardware, placed, store, **given["options"])
    except Exception as error:
        worker_main.send_error(channel, Kind.FAILED, error)
        return None
    channel.send(Kind.READY)
    return runtime, checkpoint.spec


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of native code may be in the middle of something
