"""Very many machines and requests at once: TTFT and decode throughput of each, by step maps."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from hybridlab.lowering import Planner
from hybridlab.plans import Role, StepPlan
from hybridlab.routing import RoutingStats
from hybridlab.simulator.cost_model import Micro
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.shapes import ModelShape
from hybridlab.simulator.step_maps import StepMap
from hybridlab.spec import ModelSpec
from hybridlab.strategies.registry import resolve

PREFILL = {
    "CPU experts": "all_host",
    "streamed": {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 8, "parts_per_layer": 4},
}
DECODE = {"plain": "prefetch", "dual batch": "dual_batch"}


RANGES = {
    "host_peak_gb_s": (50.0, 1300.0),
    "cpu_tflops": (2.0, 60.0),
    "link_gb_s": (12.0, 110.0),
    "gpu_read_gb_s": (300.0, 5000.0),
    "gpu_tflops": (40.0, 1000.0),
}
"""From a desktop's to a server's; parameters of a drawn machine lie about equally far between these."""
SPREAD = 0.35
"""Standard deviation of the logarithm of what each parameter deviates by from that."""


def configuration_rows(
    machine: Machine, spec: ModelSpec, shape: ModelShape, machines: int, *, prompt_tokens: int = 2048, seed: int = 0
) -> dict[str, np.ndarray]:
    """Columns of configurations, each [4 machines]: every drawn machine under every strategy (prefill x decode).

    `RANGES` says what is drawn, log-uniform; 2 to 16 requests decode together. The rest is `machine`'s. `ttft_s` is of
    one prompt of `prompt_tokens` alone, `output_tokens_per_s` of the requests together behind such prompts, `tpot_s` of
    each; nothing queues. Rows of one machine have one number in `machine`.
    """
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.0, 1.0, machines)
    drawn = {
        name: low * (high / low) ** size * np.exp(SPREAD * rng.standard_normal(machines))
        for name, (low, high) in RANGES.items()
    }
    given, requests = replace(machine, **drawn), rng.integers(2, 17, machines).astype(float)
    whole = [Micro.prefill(float(prompt_tokens))]
    ttft_s = {
        name: _map(machine, spec, way, "prefetch", "prefill")(given, shape, whole) for name, way in PREFILL.items()
    }
    tpot_s = {}
    for name, overlap in DECODE.items():
        steps = _map(machine, spec, "all_host", overlap, "decode")
        micros = steps.program.shape.num_microbatches
        tpot_s[name] = steps(given, shape, [Micro.decode(requests / micros, float(prompt_tokens))] * micros)
    found = [
        {
            "machine": np.arange(machines),
            "strategy": np.full(machines, f"{prefill}, {decode}"),
            **drawn,
            "requests": requests,
            "ttft_s": ttft_s[prefill],
            "tpot_s": tpot_s[decode],
            "output_tokens_per_s": requests / tpot_s[decode],
            "evidence": np.full(machines, "simulated"),
        }
        for prefill, decode in product(PREFILL, DECODE)
    ]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _map(machine: Machine, spec: ModelSpec, placement: Any, overlap: str, role: Role) -> StepMap:
    hardware = machine.hardware("map", gpu=True)
    placed_by = resolve("placement", placement)
    placed = placed_by.place(spec, hardware, RoutingStats())
    planner = Planner(spec, hardware, placed_by, resolve("overlap", overlap), placed)
    tokens = {"a": 4096} if role == "prefill" else {"a": 1, "b": 1}
    return StepMap(planner.program(planner.shape("main", StepPlan(role, tokens))), spec)
