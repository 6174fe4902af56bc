"""What the dual batch takes beside plain batches and its bound, for every stored run, and the figures.

`python experiments/dual_batch/analysis.py [FOLDER]` reads all decode*.jsonl in and below results/paper/dual_batch, and
draws tokens/s over TPOT at each depth beside the file: decode.jsonl gives decode_1024.{png,svg,pdf,json}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

from hybridlab.figures import decode_table, decode_tradeoff, read_decode, save_figure

matplotlib.use("Agg")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper" / "dual_batch"
TIMES = ["attention_s", "experts_s", "hand_offs_s", "bound_s", "dual_s", "plain_s", "alone_s", "cpu_s"]
SHOWN = ["depth", "batch", *TIMES, "fraction", "gain", "gain over 1"]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    rows: Any = read_decode(folder)
    for (file, preset, machine, code), run in rows.groupby(["file", "preset", "machine", "code"], sort=False):
        kinds = list(dict.fromkeys(run["evidence"]))
        print(f"{file}: {preset}, {machine}; code {code}; {', '.join(kinds)}; medians of {run['steps'].iloc[0]} steps")
        table: Any = decode_table(run)
        table["gain over 1"] = table["batch"] * table["alone_s"] / table["dual_s"]
        milliseconds = table.assign(**{name: 1e3 * table[name] for name in TIMES})
        names = {name: f"{name.removesuffix('_s')} ms" for name in TIMES}
        shown = milliseconds[SHOWN].rename(columns=names).dropna(axis="columns", how="all")
        print(shown.to_string(index=False, na_rep="", float_format="{:.2f}".format), end="\n\n")
        for depth, part in run.groupby("depth"):
            stem = (folder / file).with_suffix("")
            ax = decode_tradeoff(part, evidence=kinds)
            save_figure(ax, f"{stem}_{depth}", command="python experiments/dual_batch/analysis.py")


if __name__ == "__main__":
    main()
