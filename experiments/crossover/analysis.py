"""From where which path of the experts is the fastest, for the stored calibration, and its figures.

`python experiments/crossover/analysis.py` reads results/paper/crossover/calibration.json and draws
crossover_{prefill,decode}.{png,svg,pdf,json} beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from hybridlab.calibration import MIXED, path_name
from hybridlab.figures import read_calibration, save_calibration

matplotlib.use("Agg")
FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper" / "crossover"


def main() -> None:
    calibration = read_calibration(FOLDER / "calibration.json")
    print(f"code {calibration.commit}")
    print(calibration)
    rows: Any = calibration.rows
    kept = (rows["path"] != MIXED) | (rows["share"] == calibration.crossovers.mixed_share)
    rows = rows[kept & (rows["min_tokens"] <= (calibration.crossovers.min_expert_tokens or 1))]
    names = [path_name(row) for row in rows.to_dict("records")]
    table = rows.assign(name=names).pivot(index="tokens", columns=["kind", "name"], values="step_s")
    print("\nseconds of a step of all layers, over tokens or requests:")
    print(table.to_string(float_format="{:.3f}".format, na_rep=""))
    gain = table["prefill"][["CPU experts", "streamed"]].min(axis=1) / table["prefill"].filter(like="mixed").iloc[:, 0]
    print("\nthe better of CPU experts and streamed, over mixed; tokens:")
    print(gain.dropna().to_string(float_format="{:.2f}".format))
    save_calibration(calibration, FOLDER, "python experiments/crossover/analysis.py")


if __name__ == "__main__":
    main()
