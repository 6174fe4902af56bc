"""Fractions of the floor, one line a variant, what parts are worth, FP8 against BF16, and the figure, from stored runs.

`python experiments/slp/analysis.py` reads results/paper/slp (of the CPUs: kernels and kernels_xeon beside it) and draws
results/paper/slp/ttft.{png,svg,pdf,json}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from hybridlab.figures import read_kernel_bench, read_slp, save_figure, slp, slp_table

matplotlib.use("Agg")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper" / "slp"
LAYERS = ("widened, grouped_mm", "BF16 x FP8 in registers", "FP8 x FP8")


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
    print("\nTTFT (s), medians of the repeats; tokens:")
    seconds = table.pivot(index="variant", columns="tokens", values="ttft_s").loc[list(dict.fromkeys(table["variant"]))]
    first = table.drop_duplicates("tokens").set_index("tokens")
    floor = pd.DataFrame({"all resident": first["resident_s"], "floor": first["floor_s"]}).T
    print(_shown(pd.concat([floor, seconds]), 3))
    print("\nfraction of the floor, max(link alone, all resident) / TTFT; tokens:")
    print(_shown(table.pivot(index="variant", columns="tokens", values="fraction").loc[seconds.index], 2))
    print("\nTTFT, times that of the ring of 2 layers; tokens:")
    print(_shown(seconds / seconds.loc["ring of 2 layers"], 2))
    measured = rows[rows["ttft_s"] > 0]
    best = measured[measured["tokens"] == measured["tokens"].max()]
    print(f"\nTFLOP/s at {best['tokens'].iloc[0]:.0f} tokens, and of a dense BF16 product's in the same run:")
    for row in best.to_dict("records"):
        print(f"  {row['variant']}: {row['tflop_s']:.0f}, {row['mfu']:.2f}")
    for name in ("vram24", "worth", "cpu"):
        _print_runs(name)
    _print_gemm()
    _print_cpus()
    save_figure(slp(rows), FOLDER / "ttft", command="python experiments/slp/analysis.py")


def _print_runs(name: str) -> None:
    """Runs beside the sweep, each with the floor of its own."""
    rows: Any = pd.read_json(FOLDER / f"{name}.jsonl", lines=True)
    print(f"\n{name}.jsonl: floor = max(link alone, all resident), each run's own")
    for row in rows[rows["floor_s"] > 0].to_dict("records"):
        limit = f", --vram-gb {row['vram_gb']:g}" if row["vram_gb"] > 0 else ""
        rate = f" ({row['load_bytes'] / row['link_s'] / 1e9:.1f} GB/s)" if row["load_bytes"] else ""
        print(
            f"  {row['variant']}{limit}, {row['tokens']:.0f} tokens: {row['ttft_s']:.3f} s "
            f"({row['ttft_s_min']:.3f} to {row['ttft_s_max']:.3f}), {row['fraction']:.2f}; link alone "
            f"{row['link_s']:.3f} s{rate}, all resident {row['resident_s']:.3f}; code {row['code']}"
        )


def _print_gemm() -> None:
    rows: Any = pd.read_json(FOLDER / "gemm.jsonl", lines=True)
    dense = rows[rows["variant"] == "dense"]["tflop_s"]
    print(f"\ngemm.jsonl: experts of a layer, {rows['machine'].iloc[0]}, torch {rows['torch'].iloc[0]}")
    print(f"dense BF16 product {dense.min():.0f} to {dense.max():.0f} TFLOP/s")
    rows = rows[rows["variant"].isin(LAYERS)]
    for (shape, here), same in rows.groupby(["shape", "experts_here"], sort=False):
        errors = ", ".join(f"{name} {error:.3f}" for name, error in same.groupby("variant")["error"].max().items())
        print(f"{shape}, {here} experts; relative error against widened: {errors}; ms, then fraction of dense; tokens:")
        for column, factor, digits in (("seconds", 1e3, 2), ("fraction", 1.0, 2)):
            print(_shown(factor * same.pivot(index="variant", columns="tokens", values=column).loc[[*LAYERS]], digits))


def _print_cpus() -> None:
    """What the CPU of that machine multiplies, beside the one of results/paper/kernels."""
    print("\nBF16 products of a loop that only multiplies, GFLOP/s, by threads; ours at 512 tokens, fraction of it:")
    for name in ("kernels_xeon", "kernels"):
        rows: Any = read_kernel_bench(FOLDER.parent / name)
        peak = rows.groupby("threads")["multiply_gflop_s"].median()
        peaks = ", ".join(f"{threads}: {gflop_s:.0f}" for threads, gflop_s in peak.items())
        many = rows[(rows["rows"] == 512) & (rows["threads"] == rows["threads"].max()) & (rows["work"] == "matrix")]
        found = many[many["contender"] == "hybridlab"]["multiply_fraction"]
        ours = f"; {found.min():.2f} to {found.max():.2f}" if len(found) else ""
        print(f"  {rows['machine'].iloc[0]}: {peaks}{ours}")


def _shown(table: pd.DataFrame, digits: int) -> str:
    return table.to_string(float_format=f"{{:.{digits}f}}".format, na_rep="", index_names=False)


if __name__ == "__main__":
    main()
