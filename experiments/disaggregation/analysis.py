"""The table that `mixed.py` is for: `python experiments/disaggregation/analysis.py OUT`; medians over the repeats."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

BASE = "one worker, whole prompts"


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each system and number of decodes, in milliseconds but for TTFT.

    `p99 x` is the p99 ITL while the prompt is computed over that of the decodes alone on the same system; `tokens/s x`
    is the output rate of the mixed run over that of "one worker, whole prompts" in the same load.
    """
    medians = rows.groupby(["system", "num_decodes", "mode"], sort=False).median(numeric_only=True)
    alone, mixed = (medians.xs(mode, level="mode") for mode in ("alone", "mixed"))
    found = pd.DataFrame(
        {
            "TTFT s": mixed["long_ttft_s"],
            "ITL p50": 1e3 * mixed["p50_window_itl_s"],
            "p90": 1e3 * mixed["p90_window_itl_s"],
            "p99": 1e3 * mixed["p99_window_itl_s"],
            "alone p99": 1e3 * alone["p99_itl_s"],
            "p99 x": mixed["p99_window_itl_s"] / alone["p99_itl_s"],
            "TPOT x": mixed["p99_tpot_s"] / alone["p99_tpot_s"],
            "tokens/s": mixed["output_tokens_per_s"],
        }
    )
    rates: dict[Any, float] = found["tokens/s"].to_dict()
    found["tokens/s x"] = [rate / rates[BASE, load] for (_, load), rate in rates.items()]
    return pd.DataFrame(found.dropna(subset=["TTFT s"]).round(3))


def prompt_alone(rows: pd.DataFrame) -> pd.DataFrame:
    """TTFT of the long prompt with nobody else, in seconds."""
    alone = pd.DataFrame(rows[rows["num_decodes"] == 0])
    return pd.DataFrame(alone.groupby("system", sort=False)[["long_ttft_s"]].median().round(3))


def main(arguments: Sequence[str]) -> None:
    path = Path(arguments[0]) / "mixed.jsonl"
    rows = pd.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    print(f"{rows['machine'].iloc[0]}; {', '.join(rows['evidence'].unique())}; medians; ITL in ms\n")
    print(table(rows).to_string(), "\n\nthe prompt alone, TTFT s:")
    print(prompt_alone(rows).to_string())


if __name__ == "__main__":
    main(sys.argv[1:])
