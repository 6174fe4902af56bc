"""Is there one copy of the weights, and how soon is a second worker ready? `measure.py CHECKPOINT [--json]`.

Two engines with a worker process each attach to held weights; /proc says what each process has mapped. Exit status 1 if
a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from time import perf_counter, process_time

import hybridlab as hl
from hybridlab import weights_held
from hybridlab.bench.one_copy import BOUND, mapped_bytes, private
from hybridlab.engine.worker_process import WorkerProcess
from hybridlab.hardware import detect
from hybridlab.weights_sharing import hold

READY_BOUND_S = 3.0
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def cpu_s(pid: int) -> float:
    """Seconds of all cores that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loaded(checkpoint: Path) -> tuple[hl.Engine, WorkerProcess, dict[str, float]]:
    """An engine, its worker, and until it was ready: seconds, and CPU seconds of parent and worker together."""
    begin_s, begin_cpu_s = perf_counter(), process_time()
    engine = hl.load(checkpoint, weight_layout="tiles", worker="process", quiet=True)
    ready_s, worker = perf_counter() - begin_s, engine.runtime
    assert isinstance(worker, WorkerProcess) and worker.pid is not None
    times = {"ready_s": ready_s, "cpu_s": process_time() - begin_cpu_s + cpu_s(worker.pid)}
    worker.wait_mapped()
    return engine, worker, times


def beside_weights_bytes(engine: hl.Engine) -> int:
    """What the memory plan of a worker sets aside for everything but the weights."""
    return sum(size for name, size in engine.memory.parts.items() if not name.startswith("weights"))


def measure(checkpoint: Path) -> dict[str, object]:
    begin_s = perf_counter()
    if (held := weights_held.find(checkpoint, "tiles")) is None:
        held = hold(checkpoint, idle_s=600.0, threads=detect(gpu=False).num_cores)
    fill_s = perf_counter() - begin_s
    (first, first_worker, first_times), (second, second_worker, second_times) = loaded(checkpoint), loaded(checkpoint)
    with first, second:
        workers = [first_worker, second_worker]
        outputs = [engine.generate(PROMPT, 8) for engine in (first, second)]
        found = [mapped_bytes(worker.pid) for worker in workers if worker.pid is not None]
        pss_bytes = sum(shared["Pss"] for shared, _ in found)
        other_private = [private(other) for _, other in found]
        planned = [beside_weights_bytes(engine) for engine in (first, second)]
        return {
            "weights_bytes": held.num_bytes,
            "pss_of_weights_summed_bytes": pss_bytes,
            "pss_over_size": pss_bytes / held.num_bytes,
            "private_bytes_of_weights": [private(shared) for shared, _ in found],
            "other_private_bytes": other_private,
            "other_private_cap_bytes": planned,
            "packed_by_workers": [worker.num_packed for worker in workers],
            "fill_or_find_s": fill_s,
            "first_worker": first_times,
            "second_worker": second_times,
            "outputs_equal": outputs[0] == outputs[1],
            "one_copy": pss_bytes <= BOUND * held.num_bytes and all(map(int.__le__, other_private, planned)),
            "soon_ready": second_times["ready_s"] < READY_BOUND_S,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.checkpoint)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {value:,.3f}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    return 0 if found["one_copy"] and found["soon_ready"] and found["outputs_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
