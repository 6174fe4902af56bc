"""What the dual batch takes beside plain batches and its bound, for every stored run, and the figures.

`python experiments/dual_batch/analysis.py [FOLDER]` reads all decode*.jsonl in and below results/paper/dual_batch, and
draws tokens/s over TPOT at each depth beside the file: decode.jsonl gives decode_1024.{png,svg,pdf,json}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from hybridlab.bench_decode_devices import CPU, DUAL, PLAIN
from hybridlab.figures import decode_tradeoff, read_decode, save_figure

matplotlib.use("Agg")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper" / "dual_batch"
RUN = ["file", "preset", "machine", "code"]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    rows: Any = read_decode(folder)
    for (file, preset, machine, code), run in rows.groupby(RUN, sort=False):
        kinds = list(dict.fromkeys(run["evidence"]))
        steps = f"medians of {run['steps'].iloc[0]} steps, in ms"
        print(f"{file}: {preset}, {machine}; code {code}; {', '.join(kinds)}; {steps}")
        print(table_of(run).to_string(index=False, na_rep="", float_format="{:.2f}".format), end="\n\n")
        for depth, part in run.groupby("depth"):
            stem = (folder / file).with_suffix("")
            ax = decode_tradeoff(part, evidence=kinds)
            save_figure(ax, f"{stem}_{depth}", command="python experiments/dual_batch/analysis.py")


def table_of(run: Any) -> pd.DataFrame:
    """One row per depth and dual batch of one run; times in ms.

    `attention` and `experts` are the sums of the ops on each lane while the other one works, `bound` what no order of
    these ops can beat, `of bound` the median over the steps of bound / step. `x plain` and `x batch 1` are tokens/s
    over those of the plain batch of as many requests, and of one request.
    """
    found = []
    times: dict[Any, float] = run.set_index(["depth", "batch", "variant"])["tpot_s"].to_dict()
    for row in run[run["variant"] == DUAL].to_dict("records"):
        depth, batch = row["depth"], row["batch"]
        alone_s, on_cpu_s = (times.get(key) for key in ((depth, 1, PLAIN), (depth, batch, CPU)))
        found.append(
            {
                "depth": depth,
                "batch": batch,
                "attention": 1e3 * row["attention_busy_s"],
                "experts": 1e3 * row["experts_busy_s"],
                "bound": 1e3 * row["bound_s"],
                "dual batch": 1e3 * row["tpot_s"],
                "of bound": row["fraction"],
                "hand-offs": 1e3 * row["hand_offs_s"],
                "plain": 1e3 * times[depth, batch, PLAIN],
                "x plain": row["times_plain"],
                "x batch 1": None if alone_s is None else batch * alone_s / row["tpot_s"],
                "device cpu": None if on_cpu_s is None else 1e3 * on_cpu_s,
            }
        )
    return pd.DataFrame(found).dropna(axis="columns", how="all")


if __name__ == "__main__":
    main()
