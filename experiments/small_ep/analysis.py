"""The tables of `emulated.py`, and its figures: `python experiments/small_ep/analysis.py [OUT] [--figures]`.

Without OUT, what results/paper/small_ep holds. With `--figures`, OUT/bytes.{png,pdf,svg} and OUT/dslp.* are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridlab.config import PAPER, project_dir
from hybridlab.figures import dslp, exchange_bytes, exchange_table, read_exchange, save_figure

SECONDS = ["system", "tokens", "compute_s", "load_s", "step_s", "over_one_rank", "exchange_s", "router_s"]
RANKS = ["ranks", "exchange", "step_s", "exchange_s", "router_s"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=project_dir() / "results" / PAPER / "small_ep")
    parser.add_argument("--figures", action="store_true")
    given = parser.parse_args()
    links, moved = read_exchange("dslp", given.out), read_exchange("bytes", given.out)
    for rows, what in ((links, "one link and two"), (moved, "bytes in all; router_work: times each token is routed")):
        told = rows[["preset", "machine", "code", "evidence"]].drop_duplicates().iloc[0]
        print(f"{what}: {', '.join(told)}\n")
        if rows is links:
            print(rows.reindex(columns=SECONDS).round(4).to_string(index=False), "\n")
    print(exchange_table(moved).round(3).to_string(index=False))
    if "step_s" in moved.columns:
        print("\nseconds of the same prompt, computed by so many ranks on this machine's cores, a thread each:\n")
        print(moved[RANKS].round(5).to_string(index=False))
    if given.figures:
        command = f"python {Path(__file__).name} {given.out.name}"
        save_figure(exchange_bytes(moved), given.out / "bytes", command=command)
        save_figure(dslp(links), given.out / "dslp", command=command)


if __name__ == "__main__":
    main()
