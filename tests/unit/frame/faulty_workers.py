"""One of several worker processes, that fails on purpose: faulty_workers.py FOLDER DESCRIPTOR PARENT.

FOLDER/plan says where: a number of the plan, a worker, a point of its protocol, how often it is passed before in each
process, and how many processes fail there. It is read at every point. FOLDER has the pids of all that were started, and
the plan's number for each that failed. With a file FOLDER/cuda, torch's CPU takes the place of device "cuda".
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

POINTS = (
    *("step", "op", "computed", "half an answer", "answered"),
    *("leave", "half left", "left", "take", "half taken", "taken", "garbled"),
)


class Plan:
    """What is to fail, and how often this process has been there."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number, self._passed = folder, -1, 0
        self.worker = ""
        """What this process is called, once it has computed a step or moved a cache."""

    def is_now(self, point: str) -> bool:
        number, worker, there, times, fires = self._folder.joinpath("plan").read_text().split("|")
        if int(number) != self._number:
            self._number, self._passed = int(number), 0
        if there != point or worker != self.worker:
            return False
        self._passed += 1
        failed = self._folder.joinpath("failed")
        before = failed.read_text().split().count(number) if failed.exists() else 0
        if self._passed != int(times) + 1 or before >= int(fires):
            return False
        with failed.open("a", encoding="utf-8") as file:
            file.write(f"{number}\n")
        return True

    def pass_by(self, point: str) -> None:
        assert point in POINTS, point
        if self.is_now(point):
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    folder = Path(sys.argv[1])
    with folder.joinpath("pids").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    from hybridlab.engine import worker_main

    plant(Plan(folder))
    if folder.joinpath("cuda").exists():
        on_cpu()
    return worker_main.main(sys.argv[2:])


def on_cpu() -> None:
    from hybridlab.engine import cuda_device, runtime

    build = cuda_device.cuda_device
    cuda_device.cuda_device = lambda *given, **options: build(*given, **{**options, "where": "cpu"})
    runtime.free_memory_bytes = lambda index: 2**33


def plant(plan: Plan) -> None:
    from hybridlab.engine import executor
    from hybridlab.engine.channel import Channel, Kind
    from hybridlab.engine.kv_region import KVRegion

    send, run, execute_for = Channel.send, executor.Executor.run, executor.Executor.execute_for
    pairs = KVRegion._pairs
    moving = ["", ""]

    def faulty_send(self, kind, *parts):
        if kind is Kind.DONE and plan.worker and any(map(len, parts)):  # of a step
            plan.pass_by("computed")
            if plan.is_now("half an answer"):
                self._socket.sendall(b"hlw1")
                os.kill(os.getpid(), signal.SIGKILL)
        send(self, kind, *parts)
        if kind is Kind.DONE and plan.worker and any(map(len, parts)):
            plan.pass_by("answered")

    def faulty_run(self, program, *arguments):
        plan.worker = program.shape.worker
        plan.pass_by("step")
        return run(self, program, *arguments)

    def faulty_execute_for(self, *arguments, **options):
        execute = execute_for(self, *arguments, **options)

        def faulty_op(op):
            plan.pass_by("op")
            execute(op)

        return faulty_op

    def faulty_move(name: str, worker: str, half: str, after: str):
        whole = getattr(KVRegion, name)

        def move(self, hand_off, request, cache, blocks):
            plan.worker = worker
            plan.pass_by(name)
            moving[0] = half
            if name == "take" and plan.is_now("garbled"):
                self._headers["step"][list(hand_off.blocks)] += 1
            whole(self, hand_off, request, cache, blocks)
            moving[0] = ""
            plan.pass_by(after)

        setattr(KVRegion, name, move)

    def faulty_pairs(self, cache):
        for count, pair in enumerate(pairs(self, cache)):
            if count and moving[0]:
                plan.pass_by(moving[0])
            yield pair

    Channel.send = faulty_send  # type: ignore[method-assign]
    executor.Executor.run = faulty_run  # type: ignore[method-assign]
    executor.Executor.execute_for = faulty_execute_for  # type: ignore[method-assign]
    KVRegion._pairs = faulty_pairs  # type: ignore[method-assign]
    faulty_move("leave", "prefill", "half left", "left")
    faulty_move("take", "decode", "half taken", "taken")


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
