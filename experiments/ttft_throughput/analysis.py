"""Medians over the repeats of the published runs: `python experiments/ttft_throughput/analysis.py`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

TABLE = Path(__file__).resolve().parents[2] / "results" / "paper" / "ttft_throughput" / "summary.csv"
SHOWN = ["offered_req_s", "output_tokens_per_s", "median_ttft_s", "p99_ttft_s", "median_tpot_s", "p99_itl_s"]

if __name__ == "__main__":
    runs = pd.read_csv(TABLE)
    print(f"machine: {runs['machine'].iloc[0]}; {', '.join(runs['evidence'].unique())}; medians of the repeats")
    print(runs.groupby(["scheduler", "workload.rate_scale"], sort=False)[SHOWN].median().round(4).to_string())
