"""A worker on device "cuda" (torch's CPU) that is killed while it makes what others of its GPU read:
faulty_maker.py FOLDER POINT DESCRIPTOR PARENT. One process in all fails; FOLDER has the pids of all."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hybridlab.engine import cuda_device, gpu_copy, runtime, worker_main


def main() -> int:
    folder, point = Path(sys.argv[1]), sys.argv[2]
    with folder.joinpath("pids").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")

    def before(owner, name: str) -> None:
        whole = getattr(owner, name)

        def faulty(self, *given, **options):
            failed = folder / "failed"
            if getattr(self, "state", "made") == "made" and not failed.exists():
                failed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, *given, **options)

        setattr(owner, name, faulty)

    if point == "fills":
        before(gpu_copy.MappedDeviceWeights, "make")
    elif point == "filled":
        before(gpu_copy.SharedOnGpu, "filled")
    else:
        assert point == "ready"  # which was told: the descriptor would follow
        before(gpu_copy.SharedOnGpu, "hand_over")
    build = cuda_device.cuda_device
    cuda_device.cuda_device = lambda *given, **options: build(*given, **{**options, "where": "cpu"})
    runtime.free_memory_bytes = lambda index: 2**33
    return worker_main.main(sys.argv[3:])


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
