"""How long a study of many simulated runs takes on this machine: configurations x requests, stored as any sweep's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from hybridlab.experiment import run

SCHEDULERS = ["fcfs", {"name": "chunked_prefill", "chunk_tokens": 512}]
PLACEMENTS = [
    "all_host",
    {"name": "streamed", "ring_slots": 8, "parts_per_layer": 8, "stream_from_tokens": 4096, "mixed_from_tokens": 256},
]
RATES_REQ_S = (0.2, 0.3, 0.4, 0.5, 0.6)
LINKS_GB_S = (12.0, 25.0, 50.0, 100.0)

AXES = ("workload.seed", "simulator.overrides.link_gb_s", "workload.rate_req_s", "placement", "scheduler")


@dataclass(frozen=True)
class Study:
    """What was computed, and how long it took, the start of the processes and the store included."""

    runs: int
    requests: int
    steps: int
    saturated: int
    processes: int
    seconds: float


def study(model: str, machine: str, *, runs: int, requests: int, processes: int) -> Study:
    """Serve `requests` requests in each of `runs` configurations: schedulers, placements, rates, links, then traces."""
    each = len(LINKS_GB_S) * len(RATES_REQ_S) * len(PLACEMENTS) * len(SCHEDULERS)
    every = itertools.product(range(-(-runs // each)), LINKS_GB_S, RATES_REQ_S, PLACEMENTS, SCHEDULERS)
    points = [dict(zip(AXES, values, strict=True)) for values in itertools.islice(every, runs)]
    with TemporaryDirectory(prefix="hybridlab-study-") as folder:
        config = {
            "experiment": "study",
            "model": {"preset": model},
            "workload": {
                "kind": "poisson", "num_requests": requests, "rate_req_s": 1.0, "prompt_tokens": [64, 512],
                "output_tokens": [16, 128],
            },
            "overlap": "prefetch",
            "simulator": {"machine": machine},
            "sweep": {"list": points},
        }  # fmt: skip
        start_s = perf_counter()
        result = run(config, backend="simulator", processes=processes, results_dir=Path(folder), progress=False)
        seconds = perf_counter() - start_s
    steps, saturated = (sum(result.summary[name].tolist()) for name in ("num_steps", "saturated"))
    return Study(runs, requests, steps, saturated, processes, seconds)
