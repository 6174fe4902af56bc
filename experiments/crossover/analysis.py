"""From how many tokens streaming beats the CPU, from how many requests dual batch beats plain: the stored calibration.

`python experiments/crossover/analysis.py` reads results/paper/crossover/calibration.json and draws
crossover_{prefill,decode}.{png,svg,pdf,json} beside it. Mixed steps are printed beside the least that their loads need,
and not drawn: README.md says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from hybridlab.calibration import CPU, MIXED, STREAMED, path_name
from hybridlab.figures import crossover, read_calibration, save_figure

matplotlib.use("Agg")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper" / "crossover"
COMMAND = "python experiments/crossover/analysis.py"


def main() -> None:
    calibration = read_calibration(FOLDER / "calibration.json")
    print(f"code {calibration.commit}\n{calibration}")
    rows: Any = calibration.rows
    rows = rows.assign(name=[path_name(row) for row in rows.to_dict("records")])
    for kind, unit in (("prefill", "tokens"), ("decode", "requests")):
        same = rows[(rows["kind"] == kind) & (rows["path"] != MIXED)]
        print(f"\nseconds of a step of all layers; {unit}:")
        print(
            _shown(same.pivot(index="name", columns="tokens", values="step_s").loc[list(dict.fromkeys(same["name"]))])
        )
        save_figure(
            crossover(calibration, kind=kind, where=_drawn(kind)), FOLDER / f"crossover_{kind}", command=COMMAND
        )
    link_s = rows[rows["path"] == STREAMED]["step_s"].median()
    mixed = rows[rows["path"] == MIXED]
    mixed = mixed.assign(share_of_need=mixed["step_s"] / (mixed["share"] * link_s))
    print(f"\nmixed: step / (share x {link_s:.3f} s of streaming all); below 1 is less than the loads need; tokens:")
    print(_shown(mixed.pivot(index="name", columns="tokens", values="share_of_need"), 2))
    layers = calibration.subject.model["num_layers"]
    first_s = mixed["step_s"] - (int(layers) - 1) * mixed["layer_s"]
    print("mixed: end of the first layer, in loads of a layer; tokens:")
    print(
        _shown(mixed.assign(loads=first_s / mixed["link_s"]).pivot(index="name", columns="tokens", values="loads"), 2)
    )


def _drawn(kind: str) -> dict[str, Any]:
    return {"path": [CPU, STREAMED]} if kind == "prefill" else {}


def _shown(table: Any, digits: int = 3) -> str:
    return table.to_string(float_format=f"{{:.{digits}f}}".format, na_rep="", index_names=False)


if __name__ == "__main__":
    main()
