"""The tables of `emulated.py` and `gpu.py`, and figures: `python experiments/small_ep/analysis.py [OUT] [--figures]`.

Without OUT, what results/paper/small_ep holds. With `--figures`, OUT/bytes.{png,pdf,svg} and OUT/dslp.* are drawn, and
OUT/dslp_gpu.* where `gpu.py` has left its rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab.config import PAPER, project_dir
from hybridlab.figures import TWO_COLUMNS_IN, dslp, exchange_bytes, exchange_table, read_exchange, save_figure

SECONDS = ["system", "tokens", "compute_s", "load_s", "step_s", "over_one_rank", "exchange_s", "router_s"]
RANKS = ["ranks", "exchange", "step_s", "exchange_s", "router_s"]
GPU = [*SECONDS[:2], *SECONDS[3:7], "link_gb_s_per_rank", "experts_sent_gb", "kv_sent_gb", "same_token"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=project_dir() / "results" / PAPER / "small_ep")
    parser.add_argument("--figures", action="store_true")
    given = parser.parse_args()
    links, moved = read_exchange("dslp", given.out), read_exchange("bytes", given.out)
    for rows, what in ((links, "one link and two"), (moved, "bytes in all; router_work: times each token is routed")):
        print(f"{what}: {_told(rows)}\n")
        if rows is links:
            print(rows.reindex(columns=SECONDS).round(4).to_string(index=False), "\n")
    print(exchange_table(moved).round(3).to_string(index=False))
    if "step_s" in moved.columns:
        print("\nseconds of the same prompt, computed by so many ranks on this machine's cores, a thread each:\n")
        print(moved[RANKS].round(5).to_string(index=False))
    command = f"python {Path(__file__).name} {given.out.name}"
    if given.figures:
        save_figure(exchange_bytes(moved), given.out / "bytes", command=command)
        save_figure(dslp(links), given.out / "dslp", command=command)
    if (path := given.out / "dslp_gpu.jsonl").exists():
        rows = gpu_rows(path)
        print(f"\none GPU and two: {_told(rows)}; GB that a rank sends\n")
        print(rows[GPU].round(3).to_string(index=False, na_rep=""))
        if given.figures:
            save_figure(dslp(rows, width_in=TWO_COLUMNS_IN), given.out / "dslp_gpu", command=command)


def gpu_rows(path: Path) -> Any:
    """The rows of `gpu.py` under the names of `hybridlab.bench.dslp`."""
    rows: Any = pd.read_json(path, lines=True)
    seconds = {f"ttft_s{end}": f"step_s{end}" for end in ("", "_min", "_max")}
    rows = rows.rename(columns={**seconds, "exchange_s_per_rank": "exchange_s"})
    several = rows["ranks"].astype(str) + " ranks, " + rows["exchange"]
    sent = {f"{what}_sent_gb": rows[f"{what}_sent_bytes"].str[0] / 1e9 for what in ("experts", "kv")}
    return rows.assign(system=several.where(rows["ranks"] > 1, "one rank"), **sent)


def _told(rows: Any) -> str:
    return ", ".join(rows[["preset", "machine", "code", "evidence"]].drop_duplicates().iloc[0])


if __name__ == "__main__":
    main()
