"""Does TTFT fall as the hit rate predicts? Fits the runs without reuse, predicts those with it.

TTFT of a prompt = a + b * tokens computed + c * pairs of (computed token, token that it attends to). Reads the
published tables: `python experiments/prefix_reuse/analysis.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

TABLES = Path(__file__).resolve().parents[2] / "results" / "paper" / "prefix_reuse"


def features(requests: pd.DataFrame) -> np.ndarray:
    computed = (requests["prompt_tokens"] - requests["cached_tokens"]).to_numpy(np.float64)
    pairs = computed * (requests["prompt_tokens"].to_numpy() - computed / 2)
    return np.stack([np.ones_like(computed), computed, pairs], axis=1)


def median_of_repeats(requests: pd.DataFrame) -> pd.DataFrame:
    numbered = requests.assign(number=requests.groupby("run_id").cumcount())
    return numbered.groupby("number").median(numeric_only=True)


def main() -> None:
    summary = pd.read_csv(TABLES / "summary.csv", dtype={"run_id": str})
    requests = pd.read_parquet(TABLES / "requests.parquet").merge(
        summary[["run_id", "engine.prefix_cache"]], on="run_id"
    )
    reused = requests["engine.prefix_cache"].astype(bool)
    on, off = median_of_repeats(requests[reused]), median_of_repeats(requests[~reused])
    fit, *_ = np.linalg.lstsq(features(off), off["ttft_s"].to_numpy(), rcond=None)
    ratio = on["ttft_s"].to_numpy() / (features(on) @ fit)
    low, middle, high = np.percentile(ratio, (10, 50, 90))
    print(f"machine: {summary['machine'].iloc[0]}; {len(on)} requests, medians of repeats; measured")
    print(f"hit rate {on['cached_tokens'].sum() / on['prompt_tokens'].sum():.3f}")
    print(f"mean TTFT without reuse {off['ttft_s'].mean():.4f} s, with reuse {on['ttft_s'].mean():.4f} s")
    print(f"mean TTFT predicted with reuse {(features(on) @ fit).mean():.4f} s")
    print(f"measured / predicted: median {middle:.2f}, p10 {low:.2f}, p90 {high:.2f}")


if __name__ == "__main__":
    main()
