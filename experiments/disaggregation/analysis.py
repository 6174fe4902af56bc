"""The tables of `mixed.py`, and its figure: `python experiments/disaggregation/analysis.py [OUT] [--figure]`.

Without OUT, what results/paper/disaggregation holds. With `--figure`, OUT/interference.{png,pdf,svg} are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridlab.config import PAPER, project_dir
from hybridlab.figures import claim_table, interference, interference_table, read_interference, save_figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=project_dir() / "results" / PAPER / "disaggregation")
    parser.add_argument("--figure", action="store_true")
    given = parser.parse_args()
    rows = read_interference(given.out)
    told = ", ".join(rows[["preset", "machine", "code", "evidence"]].drop_duplicates().iloc[0])
    print(
        f"{told}; medians of {rows['repeat'].nunique()}; TTFT in s, TPOT and ITL in ms; ITL mixed: during the prompt\n"
    )
    print(interference_table(rows).round(2).to_string(index=False))
    print("\nThe paper's claim (+50% throughput at < 15% latency increase), in percent, of the same runs:\n")
    print(claim_table(rows).round(1).to_string(index=False))
    if given.figure:
        save_figure(
            interference(rows), given.out / "interference", command=f"python {Path(__file__).name} {given.out.name}"
        )


if __name__ == "__main__":
    main()
