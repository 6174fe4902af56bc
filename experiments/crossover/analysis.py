"""From how many tokens streaming or mixed steps beat the CPU, from how many requests dual batch beats plain.

`python experiments/crossover/analysis.py` reads results/paper/crossover/calibration.json and draws
crossover_{prefill,decode}.{png,svg,pdf,json} beside it. Mixed steps are printed beside the least that their loads need,
and beside layers48/calibration.json, which measured every layer where the other one measured four.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from hybridlab.calibration.results import DUAL, MIXED, PLAIN, STREAMED, Calibration, path_name
from hybridlab.figures import crossover, read_calibration, save_figure

matplotlib.use("Agg")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper" / "crossover"
COMMAND = "python experiments/crossover/analysis.py"


def main() -> None:
    calibration = read_calibration(FOLDER / "calibration.json")
    print(f"code {calibration.commit}\n{calibration}")
    rows = _rows(calibration)
    for kind, unit in (("prefill", "tokens"), ("decode", "requests")):
        same = rows[rows["kind"] == kind]
        print(f"\nseconds of a step of all layers; {unit}:")
        print(_table(same, "step_s"))
        save_figure(crossover(calibration, kind=kind), FOLDER / f"crossover_{kind}", command=COMMAND)
    link_s = rows[rows["path"] == STREAMED]["step_s"].median()
    mixed = rows[rows["path"] == MIXED]
    mixed = mixed.assign(share_of_need=mixed["step_s"] / (mixed["share"] * link_s))
    print(f"\nmixed: step / (share x {link_s:.3f} s of streaming all); below 1 is less than the loads need; tokens:")
    print(_table(mixed, "share_of_need", 2))
    _print_first_layers(calibration)
    decode = rows[rows["kind"] == "decode"].pivot(index="tokens", columns="path", values="step_s")
    ratios = (decode[DUAL] / decode[PLAIN]).items()
    print("\ndual batch over plain, steps of", ", ".join(f"{requests}: {ratio:.2f}" for requests, ratio in ratios))
    _print_whole(rows)


def _print_whole(rows: Any) -> None:
    """What steps of all layers took, over what is said of them by a few."""
    whole = read_calibration(FOLDER / "layers48" / "calibration.json")
    print(f"\nall {whole.layers} layers measured, code {whole.commit}: seconds of a step; tokens or requests:")
    measured = _rows(whole)
    print(_table(measured, "step_s"))
    both = measured.merge(rows, on=["kind", "name", "tokens"], suffixes=("", "_few"))
    _print_first_layers(whole)
    print("steps over the same by the layers measured above:")
    print(_table(both.assign(ratio=both["step_s"] / both["step_s_few"]), "ratio", 2))


def _print_first_layers(calibration: Calibration) -> None:
    rows = _rows(calibration)
    mixed = rows[rows["path"] == MIXED]
    first_s = mixed["step_s"] - (int(calibration.subject.model["num_layers"]) - 1) * mixed["layer_s"]
    print("mixed: end of the first layer, in loads of a layer; tokens:")
    print(_table(mixed.assign(loads=first_s / mixed["link_s"]), "loads", 2))


def _rows(calibration: Calibration) -> Any:
    rows: Any = calibration.rows
    return rows.assign(name=[path_name(row) for row in rows.to_dict("records")])


def _table(rows: Any, values: str, digits: int = 3) -> str:
    table = rows.pivot(index="name", columns="tokens", values=values).loc[list(dict.fromkeys(rows["name"]))]
    return table.to_string(float_format=f"{{:.{digits}f}}".format, na_rep="", index_names=False)


if __name__ == "__main__":
    main()
