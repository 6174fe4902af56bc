"""Does `hl.tune` find what an exhaustive engine search finds? Measures the machine, tunes, then runs all the space.

`python experiments/tune/compare.py [--config FILE] [--most-runs N] [--limit-s S]`: prints one JSON value. What has run
is kept in results/tune, so that a call that was ended goes on, and the engine runs of the tuning count for both.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import hybridlab as hl
from hybridlab.backends import checkpoint_of, make_missing
from hybridlab.calibration.profile import write_profile
from hybridlab.config import ExperimentConfig, load_config, points
from hybridlab.tuning.search import tune_config
from hybridlab.tuning.tuned import Tuned

HERE = Path(__file__).parent


def measured_machine(config: ExperimentConfig) -> Path:
    """The profile that the config simulates, measured now if it is not there; the checkpoint is made for it."""
    path = config.project_dir / config.simulator.machine
    if not path.exists():
        folder = checkpoint_of(config.model, config.project_dir / "results", config.project_dir)
        make_missing(config.model, folder, progress=True)
        engine = config.engine
        found = hl.measure_profile(
            folder, engine.device or "cpu", threads=engine.threads, accelerator_threads=engine.accelerator_threads,
            link_gb_s=engine.link_gb_s, vram_gb=engine.vram_gb,
        )  # fmt: skip
        write_profile(found, path)
    return path


def compared(config: ExperimentConfig, tuned: Tuned, limit_s: float) -> dict[str, Any]:
    """The goodput that was tuned to beside the most of every candidate that runs within `limit_s` seconds."""
    end_s, goodputs = time.monotonic() + limit_s, []
    every = points(config)
    for count, point in enumerate(every):
        if goodputs and time.monotonic() > end_s:
            print(f"out of time after {count} of {len(every)} candidates; calling again goes on", file=sys.stderr)
            break
        goodputs += hl.run(point.config).summary["request_goodput_req_s"].tolist()
    found = tuned.table["measured_goodput_req_s"].tolist()[0]
    best = max(goodputs)
    return {
        "tuned_goodput_req_s": found,
        "best_goodput_req_s": best,
        "worst_goodput_req_s": min(goodputs),
        "regret": 1 - found / best if best > 0 else 0.0,
        "engine_runs": tuned.runs,
        "candidates_run": len(goodputs),
        "candidates": len(every),
        "complete": len(goodputs) == len(every) and tuned.complete,
    }


def main() -> None:
    """Print what was found; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--most-runs", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=300.0)
    given = parser.parse_args()
    config = load_config(given.config)
    print(f"machine {measured_machine(config)}", file=sys.stderr)
    tuned = tune_config(config, most_runs=given.most_runs)
    print(tuned, file=sys.stderr)
    print(json.dumps(compared(config, tuned, given.limit_s), indent=2))


if __name__ == "__main__":
    main()
