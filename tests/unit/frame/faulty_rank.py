"""A rank that is killed on purpose: faulty_rank.py RANK POINT DESCRIPTOR PARENT.

The process that is rank RANK kills itself at POINT: "setup", "ready", an op kind, "keys" (before it has sent its keys
and values), "answer", or stops there for ever: "hang". The second layer's ops, where there is one. "op:3" is the fourth
op that the rank computes, whatever that is.
"""

from __future__ import annotations

import os
import signal
import sys

POINTS = ("setup", "ready", "keys", "all_gather", "experts", "reduce", "answer")


def main() -> int:
    rank, point = int(sys.argv[1]), sys.argv[2]
    from hybridlab.engine import rank_main, ranks_runtime
    from hybridlab.engine.channel import Channel, Kind
    from hybridlab.engine.ranks_cache import SharedKV
    from hybridlab.engine.ranks_executor import RankExecutor

    made = ranks_runtime.RankRuntime.__init__
    me = [-1]
    seen: list[int] = []

    def fail(here: str) -> None:
        if me[0] == rank and here == point:
            os.kill(os.getpid(), signal.SIGKILL)
        if me[0] == rank and point == "hang" and here == "experts":
            os.kill(os.getpid(), signal.SIGSTOP)

    def make(self, *arguments, **options):
        me[0] = options["rank"]
        fail("setup")
        made(self, *arguments, **options)

    send, write, execute_for = Channel.send, SharedKV.write, RankExecutor._execute_for

    def faulty_send(self, kind, *parts):
        fail({Kind.READY: "ready", Kind.DONE: "answer"}.get(kind, ""))
        send(self, kind, *parts)

    def faulty_write(self, layer, *arguments):
        if layer:
            fail("keys")
        write(self, layer, *arguments)

    def faulty_execute(self, *arguments, **options):
        execute = execute_for(self, *arguments, **options)

        def faulty(op):
            if op.layer:
                fail(op.kind)
            fail(f"op:{len(seen)}")
            seen.append(op.id)
            execute(op)

        return faulty

    ranks_runtime.RankRuntime.__init__ = make  # type: ignore[method-assign]
    Channel.send = faulty_send  # type: ignore[method-assign]
    SharedKV.write = faulty_write  # type: ignore[method-assign]
    RankExecutor._execute_for = faulty_execute  # type: ignore[method-assign]
    return rank_main.main(sys.argv[3:])


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
