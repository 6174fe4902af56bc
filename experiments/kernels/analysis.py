"""Decode and prefill end to end, one line a setting: each repeat's fraction of the ceiling beside it, and the rate.

Reads the published runs of `end_to_end.sh`: `python experiments/kernels/analysis.py`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

RUNS = Path(__file__).resolve().parents[2] / "results" / "paper" / "kernels" / "end_to_end.jsonl"


def main() -> None:
    runs = pd.read_json(RUNS, lines=True)
    print(f"{runs['model'].iloc[0]}, {runs['threads'].iloc[0]} threads, {runs['tier'].iloc[0]}; measured, all repeats")
    for (layout, tokens, batch, depth), same in runs.groupby(
        ["weight_layout", "tokens", "batch", "depth"], dropna=False, sort=False
    ):
        is_decode = pd.isna(tokens)
        what = f"decode, batch {batch:.0f}, depth {depth:.0f}" if is_decode else f"prefill of {tokens:.0f} tokens"
        fractions = ", ".join(f"{fraction:.2f}" for fraction in same["fraction"])
        ceiling = "read" if is_decode else "multiply"
        rates = ", ".join(f"{rate:.1f}" for rate in same["tokens_per_s"])
        print(f"  {layout:5}  {what:28}  {fractions:10} of the {ceiling} loop; {rates} tokens/s")


if __name__ == "__main__":
    main()
