"""Fractions of the floor, one line a variant, and the figure, from the stored run.

`python experiments/slp/analysis.py` reads results/paper/slp and draws results/paper/slp/ttft.{png,svg,pdf,json}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from hybridlab.figures import read_slp, save_figure, slp, slp_table

matplotlib.use("Agg")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper" / "slp"


def main() -> None:
    rows: Any = read_slp(FOLDER)
    table = slp_table(rows)
    links = rows[rows["variant"] == "link alone"]
    gigabytes = links["load_bytes"].iloc[0] / 1e9
    print(f"{rows['preset'].dropna().iloc[0]}, {rows['machine'].iloc[0]}; code {rows['code'].iloc[0]}; measured")
    print(
        f"link alone: {gigabytes:.1f} GB in {links['seconds'].median():.3f} s "
        f"({links['seconds'].min():.3f} to {links['seconds'].max():.3f}; "
        f"{links['gb_s'].min():.1f} to {links['gb_s'].max():.1f} GB/s)"
    )
    names = table["variant"] + [f", --vram-gb {gb:g}" if pd.notna(gb) else "" for gb in table["vram_gb"]]
    table = table.assign(variant=names)
    print("\nTTFT (s), medians of the repeats; tokens:")
    seconds = table.pivot(index="variant", columns="tokens", values="ttft_s").loc[list(dict.fromkeys(names))]
    first = table.drop_duplicates("tokens").set_index("tokens")
    floor = pd.DataFrame({"all resident": first["resident_s"], "floor": first["floor_s"]}).T
    print(_shown(pd.concat([floor, seconds]), 3))
    print("\nfraction of the floor, max(link alone, all resident) / TTFT; tokens:")
    print(_shown(table.pivot(index="variant", columns="tokens", values="fraction").loc[seconds.index], 3))
    measured = rows[rows["ttft_s"] > 0]
    best = measured[measured["tokens"] == measured["tokens"].max()]
    print(f"\nTFLOP/s at {best['tokens'].iloc[0]:.0f} tokens:")
    for row in best.to_dict("records"):
        limit = f", --vram-gb {row['vram_gb']:g}" if pd.notna(row["vram_gb"]) else ""
        print(f"  {row['variant']}{limit}: {row['tflop_s']:.0f}")
    save_figure(slp(rows), FOLDER / "ttft", command="python experiments/slp/analysis.py")


def _shown(table: pd.DataFrame, digits: int) -> str:
    return table.to_string(float_format=f"{{:.{digits}f}}".format, na_rep="", index_names=False)


if __name__ == "__main__":
    main()
