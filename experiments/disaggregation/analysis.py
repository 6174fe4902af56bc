"""The tables of `mixed.py` and `gpu.py`, and figures: `python experiments/disaggregation/analysis.py [OUT] [--figure]`.

Without OUT, what results/paper/disaggregation holds. With `--figure`, OUT/interference.{png,pdf,svg} are drawn from
OUT/mixed.jsonl, and OUT/interference_gpu.* from OUT/gpu.jsonl, where they are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab.config import PAPER, project_dir
from hybridlab.figures import claim_table, interference, interference_table, read_interference, save_figure

MODES = {"decodes alone": "alone", "prompt alone": "alone", "mixed": "mixed"}
"""Those of `gpu.py`, as `hybridlab.bench.interference` has them."""
MEMORY = ["worker_weights_pss_gb", "prefill_weights_pss_gb", "decode_weights_pss_gb", "weights_gb", "copies"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=project_dir() / "results" / PAPER / "disaggregation")
    parser.add_argument("--figure", action="store_true")
    given = parser.parse_args()
    command = f"python {Path(__file__).name} {given.out.name}"
    if (given.out / "mixed.jsonl").exists():
        rows = read_interference(given.out)
        print_tables(rows)
        if given.figure:
            save_figure(interference(rows), given.out / "interference", command=command)
    if (path := given.out / "gpu.jsonl").exists():
        print("\ngpu.jsonl:")
        everything: Any = pd.read_json(path, lines=True)
        rows = everything[everything["mode"].isin(MODES)].rename(columns={"model": "preset"})
        rows = rows.assign(mode=rows["mode"].map(MODES)).astype({"num_decodes": int, "repeat": int})
        print_tables(rows)
        memory = everything[everything["mode"] == "memory"].set_index("system")[MEMORY]
        print("\nweights in host memory, PSS of each worker's mapping in GB; copies: their sum over the size:\n")
        print(memory.round(2).to_string(na_rep=""))
        if given.figure:
            save_figure(interference(rows), given.out / "interference_gpu", command=command)


def print_tables(rows: Any) -> None:
    told = ", ".join(rows[["preset", "machine", "code", "evidence"]].drop_duplicates().iloc[0])
    repeats = ", ".join(f"{system} {count}" for system, count in (rows.groupby("system")["repeat"].max() + 1).items())
    print(f"{told}; medians of the repeats ({repeats})")
    print("TTFT in s, TPOT and ITL in ms; ITL mixed: during the prompt\n")
    print(interference_table(rows).round(2).to_string(index=False))
    print("\nThe paper's claim (+50% throughput at < 15% latency increase), in percent, of the same runs:\n")
    print(claim_table(rows).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
