"""A rank that is killed on purpose: faulty_rank.py PLAN RANK DESCRIPTOR PARENT.

The process that is rank RANK kills itself where the file PLAN says, as "once POINT" or "always POINT": "setup",
"ready", an op kind, "keys" (before it has sent its keys and values), "answer", "catch_up", "alone" (an op, with no
other rank beside it), or stops there for ever: "hang". The second layer's ops, where there is one. "op:3" is the fourth
op of a step that the rank computes, whatever that is. What was to happen once takes PLAN away.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

POINTS = ("setup", "ready", "keys", "all_gather", "experts", "reduce", "answer", "catch_up", "alone")


def main() -> int:
    plan, rank = Path(sys.argv[1]), int(sys.argv[2])
    from hybridlab.engine import rank_main, ranks_runtime
    from hybridlab.engine.channel import Channel, Kind
    from hybridlab.engine.executor import Executor
    from hybridlab.engine.ranks_cache import SharedKV
    from hybridlab.engine.ranks_executor import RankExecutor

    made = ranks_runtime.RankRuntime.__init__
    me = [-1]
    seen: list[int] = []

    def fail(*here: str) -> None:
        if me[0] != rank or not plan.exists():
            return
        times, point = plan.read_text().split()
        if point not in here:
            return
        if times == "once":
            plan.unlink()
        os.kill(os.getpid(), signal.SIGSTOP if point == "hang" else signal.SIGKILL)

    def make(self, *arguments, **options):
        me[0] = options["rank"]
        fail("setup")
        made(self, *arguments, **options)

    send, write, catch_up = Channel.send, SharedKV.write, SharedKV.catch_up
    execute_for, execute_alone = RankExecutor._execute_for, Executor.execute_for

    def faulty_send(self, kind, *parts):
        fail({Kind.READY: "ready", Kind.DONE: "answer"}.get(kind, ""))
        send(self, kind, *parts)

    def faulty_write(self, layer, *arguments):
        if layer:
            fail("keys")
        write(self, layer, *arguments)

    def faulty_catch_up(self, blocks):
        fail("catch_up")
        catch_up(self, blocks)

    def faulty_alone(self, program, *arguments, **options):
        execute = execute_alone(self, program, *arguments, **options)

        def faulty(op):
            if op.layer and len(program.shape.ranks) == 1:
                fail("alone")
            execute(op)

        return faulty

    def faulty_execute(self, *arguments, **options):
        execute = execute_for(self, *arguments, **options)
        seen.clear()

        def faulty(op):
            if op.layer:
                fail(op.kind, "hang" if op.kind == "experts" else "")
            fail(f"op:{len(seen)}")
            seen.append(op.id)
            execute(op)

        return faulty

    ranks_runtime.RankRuntime.__init__ = make  # type: ignore[method-assign]
    Channel.send = faulty_send  # type: ignore[method-assign]
    SharedKV.write = faulty_write  # type: ignore[method-assign]
    SharedKV.catch_up = faulty_catch_up  # type: ignore[method-assign]
    Executor.execute_for = faulty_alone  # type: ignore[method-assign]
    RankExecutor._execute_for = faulty_execute  # type: ignore[method-assign]
    return rank_main.main(sys.argv[3:])


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
