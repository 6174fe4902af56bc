"""What the dual batch takes beside plain batches and its bound, for every stored run, hand-offs alone, and the figures.

`python experiments/dual_batch/analysis.py [FOLDER]` reads all decode*.jsonl and handoff.jsonl in and below
results/paper/dual_batch, and draws tokens/s over TPOT at each depth beside the file: decode.jsonl gives
decode_1024.{png,svg,pdf,json}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from hybridlab.figures import decode_table, decode_tradeoff, read_decode, save_figure

matplotlib.use("Agg")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper" / "dual_batch"
TIMES = ["attention_s", "experts_s", "hand_offs_s", "bound_s", "dual_s", "plain_s", "alone_s", "cpu_s"]
SHOWN = ["depth", "batch", *TIMES, "fraction", "gain", "gain over 1"]
ALL_TIMES = ["tpot_s", "attention_busy_s", "experts_busy_s", "hand_offs_s", "bound_s"]
ALL_SHOWN = ["depth", "batch", "variant", "tokens_per_s", *ALL_TIMES, "fraction", "experts / attention"]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    rows: Any = read_decode(folder)
    for (file, preset, machine, code), run in rows.groupby(["file", "preset", "machine", "code"], sort=False):
        kinds = list(dict.fromkeys(run["evidence"]))
        print(f"{file}: {preset}, {machine}; code {code}; {', '.join(kinds)}; medians of {run['steps'].iloc[0]} steps")
        table: Any = decode_table(run)
        table["gain over 1"] = table["batch"] * table["alone_s"] / table["dual_s"]
        run = run.assign(**{"experts / attention": run["experts_busy_s"] / run["attention_busy_s"]})
        _print_ms(run.sort_values(["depth", "batch"], kind="stable")[ALL_SHOWN], ALL_TIMES)
        print("dual batches:")
        _print_ms(table[SHOWN], TIMES)
        for depth, part in run.groupby("depth"):
            stem = (folder / file).with_suffix("")
            ax = decode_tradeoff(part, evidence=kinds)
            save_figure(ax, f"{stem}_{depth}", command="python experiments/dual_batch/analysis.py")
    for path in sorted(folder.rglob("handoff.jsonl")):
        _print_hand_offs(path.relative_to(folder), pd.read_json(path, lines=True))


def _print_ms(table: Any, times: list[str]) -> None:
    milliseconds = table.assign(**{name: 1e3 * table[name] for name in times})
    names = {name: f"{name.removesuffix('_s')} ms" for name in times}
    shown = milliseconds.rename(columns=names).dropna(axis="columns", how="all")
    print(shown.to_string(index=False, na_rep="", float_format="{:.2f}".format), end="\n\n")


def _print_hand_offs(file: Path, rows: Any) -> None:
    print(f"{file}: {rows['machine'].iloc[0]}; code {rows['code'].iloc[0]}; measured")
    print("us a layer for a hand-off down and up, nothing computed in between; tokens:")
    graph = rows["graph"].map({True: "in a graph", False: "enqueued"})
    table = rows.assign(how=graph).pivot(index=["way", "how"], columns="tokens", values="us_a_layer")
    order = [(way, how) for way in dict.fromkeys(rows["way"]) for how in ("enqueued", "in a graph")]
    table = table.reindex([one for one in order if one in table.index])
    print(table.drop(index="no hand-off", level="way").to_string(float_format="{:.0f}".format))


if __name__ == "__main__":
    main()
