"""A worker process that fails on purpose: faulty_worker.py PIDS FIRST LATER DESCRIPTOR PARENT.

Its pid is added to the file PIDS. FIRST is where the first process of that file fails, LATER where the others do:
"start", "none", or a point of the protocol and how often it is passed before.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

POINTS = ("loaded", "step", "op", "done", "half", "garbage", "raise", "lost", "input", "assert")


def main() -> int:
    pids, first, later = sys.argv[1:4]
    with Path(pids).open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    point, _, times = (first if len(Path(pids).read_text().split()) == 1 else later).partition(":")
    if point == "start":
        die()
    from hybridlab.engine import worker_main

    if point != "none":
        assert point in POINTS, point
        fail_at(point, int(times or 0))
    return worker_main.main(sys.argv[4:])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_at(point: str, times: int) -> None:
    """Have the process fail at `point` once it has been there `times` times."""
    from hybridlab.engine import executor
    from hybridlab.engine.channel import Channel, Kind
    from hybridlab.errors import StrategyError, WorkerLost

    left = [times]

    def is_now() -> bool:
        left[0] -= 1
        return left[0] == -1

    send, run, execute_all = Channel.send, executor.Executor.run, executor.Executor._run

    def faulty_send(self, kind, *parts):
        if kind is Kind.READY and point == "loaded":
            die()
        if kind is Kind.DONE and point in ("done", "half", "garbage") and is_now():
            if point == "half":
                self._socket.sendall(b"hlw1")
            if point == "garbage":
                return send(self, kind, b"xyz")
            die()
        return send(self, kind, *parts)

    def faulty_run(self, *arguments):
        if point == "step" and is_now():
            die()
        return run(self, *arguments)

    def faulty_execute(self, *arguments, **options):
        lanes = self._device.lanes
        run_lanes = type(lanes).run

        def faulty_lanes(self, program, execute, clock_start_s):
            def faulty_op(op):
                if point in ("op", "raise", "lost", "input", "assert") and is_now():
                    if point == "op":
                        die()
                    if point == "assert":  # on the device: an index that is not there
                        import torch

                        nothing = torch.zeros(1, device="cuda")[torch.full((1,), 9, device="cuda")]
                        raise RuntimeError(f"injected after {nothing}")
                    raise {"raise": RuntimeError, "lost": WorkerLost, "input": StrategyError}[point]("injected")
                execute(op)

            return run_lanes(self, program, faulty_op, clock_start_s)

        try:
            type(lanes).run = faulty_lanes
            return execute_all(self, *arguments, **options)
        finally:
            type(lanes).run = run_lanes

    Channel.send = faulty_send  # type: ignore[method-assign]
    executor.Executor.run = faulty_run  # type: ignore[method-assign]
    executor.Executor._run = faulty_execute  # type: ignore[method-assign]


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
