"""Calibrate this machine, then hold the simulator against the engine on configurations that the fit has not seen.

    python experiments/agreement/measure.py [--out DIR] [--minutes 11] [--few]

Rows are written as they come (steps.csv, traces.csv), the profiles as cpu.toml and emulated.toml; at the end, and for
what is there after --minutes, analysis.py says what was found.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import analysis
import pandas as pd

import hybridlab as hl
from hybridlab.agreement import Bracket, Load, Twin, compared, compared_trace
from hybridlab.backends import checkpoint_of, make_missing
from hybridlab.calibration.profile import measure_profile, write_profile
from hybridlab.config import ModelConfig
from hybridlab.hardware import detect
from hybridlab.simulator.machine import Profile

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(preset="qwen3-7b-a1b", layers=4)
RING: dict[str, Any] = {"name": "streamed", "ring_slots": 4, "parts_per_layer": 4}
STREAMED = {**RING, "stream_from_tokens": 33}
MIXED = {**RING, "stream_from_tokens": 2**30, "mixed_from_tokens": 33, "mixed_share": 0.5, "min_expert_tokens": 1}
ENGINES: tuple[tuple[str, str, Any, str, float | None], ...] = (
    ("cpu", "all host", "all_host", "sequential", None),
    ("emulated", "all host", "all_host", "prefetch", None),
    ("emulated", "dual batch", "all_host", "dual_batch", None),
    ("emulated", "all resident", "all_resident", "prefetch", None),
    ("emulated", "streamed", STREAMED, "prefetch", None),
    ("emulated", "streamed", STREAMED, "prefetch", 4.0),
    ("emulated", "streamed", STREAMED, "prefetch", 2.0),
    ("emulated", "mixed", MIXED, "prefetch", None),
    ("emulated", "mixed", MIXED, "prefetch", 3.0),
)
"""(device, strategy, placement, overlap, cap of the link in GB/s)."""
LOADS = (Load(1, 100), Load(3, 100), Load(6, 150), Load(1, 400), Load(3, 300), Load(2, 600))
FEW = (Load(1, 100), Load(3, 100))
SHARES = (0.6, 0.75, 0.9)
TRACED = {("cpu", "all host"), ("emulated", "streamed"), ("emulated", "all host")}
NUM_REQUESTS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "agreement")
    parser.add_argument("--minutes", type=float, default=11.0)
    parser.add_argument("--few", action="store_true", help="two loads on each engine and one trace: a trial")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    end_s = perf_counter() + 60 * given.minutes
    checkpoint = checkpoint_of(MODEL, ROOT / "results", ROOT)
    make_missing(MODEL, checkpoint)
    threads = detect().num_cores
    profiles: dict[str, Profile] = {}
    for device in ("cpu", "emulated"):
        profiles[device] = measure_profile(checkpoint, device, threads=threads)
        print(f"wrote {write_profile(profiles[device], given.out / f'{device}.toml')}", flush=True)
    bracket, steps, traces = Bracket(threads), [], []
    for kind, row in rows(checkpoint, profiles, bracket, threads, end_s, given.few):
        found = steps if kind == "steps" else traces
        found.append({**row, "repeated": bracket.repeated, "dropped": bracket.dropped})
        pd.DataFrame(found).to_csv(given.out / f"{kind}.csv", index=False)
        print(kind, {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}, flush=True)
    print(analysis.report(given.out))


def rows(
    checkpoint: Path, profiles: dict[str, Profile], bracket: Bracket, threads: int, end_s: float, few: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    for device, strategy, placement, overlap, cap in ENGINES:
        about = {"device": device, "strategy": strategy, "link_gb_s": cap}
        options: dict[str, Any] = {} if cap is None else {"link_gb_s": cap}
        with hl.load(
            checkpoint, device=device, threads=threads, placement=placement, overlap=overlap, token_budget=2048,
            kv_tokens=8192, prefix_cache=False, quiet=True, **options,
        ) as engine:  # fmt: skip
            engine.lone_runtime.wait_mapped()
            engine.lone_runtime.randomise_cache(0)
            engine.serve(Load(2, 64).made(engine.spec.vocab), keep_span_steps=0)  # what is set up once
            twin = Twin(engine, profiles[device].machine, cap)
            for row in compared(engine, twin, FEW if few else LOADS, bracket, about):
                yield "steps", row
                if perf_counter() > end_s:
                    return
            if (device, strategy) not in TRACED or cap is not None:
                continue
            for share in SHARES[:1] if few else SHARES:
                asked: dict[str, Any] = {"share": share, "count": 12 if few else NUM_REQUESTS, "scheduler": "fcfs"}
                row = compared_trace(engine, twin, bracket, about, **asked)
                if row is not None:
                    yield "traces", row
                if perf_counter() > end_s:
                    return


if __name__ == "__main__":
    main()
