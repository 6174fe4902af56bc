"""A worker process whose device "cuda" is torch's CPU: cuda_on_cpu_worker.py DESCRIPTOR PARENT."""

from __future__ import annotations

import os
import sys

from hybridlab.engine import cuda_device, runtime, worker_main

if __name__ == "__main__":
    build = cuda_device.cuda_device
    cuda_device.cuda_device = lambda *given, **options: build(*given, **{**options, "where": "cpu"})
    runtime.free_memory_bytes = lambda index: 2**33
    status = worker_main.main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)
