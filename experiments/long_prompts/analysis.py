"""Chats and long prompts apart, under each system: `python experiments/long_prompts/analysis.py [FOLDER]`.

Reads the published tables (`hybridlab figures --publish long_prompts`), by default those of results/paper/long_prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hybridlab.config import PAPER, project_dir

LONG_TOKENS = 512
"""As `short_tokens` of the scheduler in config.yaml."""


def table(summary: pd.DataFrame, requests: pd.DataFrame) -> pd.DataFrame:
    """A row per system; TTFT in s, TPOT and ITL in ms, of prompts below `LONG_TOKENS` ("chat") and of the others."""
    rows = []
    for run in summary.to_dict("records"):
        own = requests[requests["run_id"] == run["run_id"]]
        of = {"chat": own[own["prompt_tokens"] < LONG_TOKENS], "long": own[own["prompt_tokens"] >= LONG_TOKENS]}
        workers = "" if pd.isna(run["engine.workers"]) else ", a worker for each"
        row = {"system": run["scheduler"] + workers, "tokens/s": run["output_tokens_per_s"]}
        for name, part in of.items():
            row |= {f"{name} TTFT p{p}": np.nanpercentile(part["ttft_s"], p) for p in (50, 99)}
        chats = of["chat"]
        gaps_s = np.concatenate([np.diff(times) for times in chats["token_times_s"]])
        row |= {f"chat TPOT p{p}": 1e3 * np.nanpercentile(chats["tpot_s"], p) for p in (50, 99)}
        row |= {f"chat ITL p{p}": 1e3 * np.percentile(gaps_s, p) for p in (50, 90, 99)}
        rows.append(row)
    return pd.DataFrame(rows).groupby("system", sort=False).median()


def main(arguments: Sequence[str]) -> None:
    folder = Path(arguments[0]) if arguments else project_dir() / "results" / PAPER / "long_prompts"
    summary = pd.read_csv(folder / "summary.csv", dtype={"run_id": str})
    requests = pd.read_parquet(folder / "requests.parquet")
    told = ", ".join(map(str, summary[["machine", "code", "evidence"]].iloc[0]))
    lengths = requests.loc[requests["run_id"] == summary["run_id"].iloc[0], "prompt_tokens"]
    print(
        f"{told}; {len(lengths)} requests, {(lengths >= LONG_TOKENS).sum()} of them of {LONG_TOKENS} tokens and more\n"
    )
    print(table(summary, requests).round(3).T.to_string())


if __name__ == "__main__":
    main(sys.argv[1:])
