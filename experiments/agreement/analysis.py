"""What the simulator got right: `python experiments/agreement/analysis.py [DIR]`; writes summary.json and figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from hybridlab.agreement import METRICS

FOLDER = Path(__file__).resolve().parents[2] / "results" / "agreement"
DIFFER = 0.10
"""By what share two measurements must differ for their order to count."""
SAME_LOAD = ["device", "requests", "prompt_tokens"]


def score(steps: Any, traces: Any = None) -> dict[str, Any]:
    """Errors are |predicted / measured - 1|. `order`: of pairs of strategies under one load and link that differ by
    more than 10%, the share in which the simulator has them the same way round. `regret`: by what share the best
    measured strategy among those that the simulator puts on its front (of all metrics) is slower than the best."""
    errors = {name: (steps[f"predicted_{name}"] / steps[f"measured_{name}"] - 1).abs() for name in METRICS}
    found: dict[str, Any] = {"configurations": len(steps)}
    for name, each in {**errors, "all": pd.concat(errors.values())}.items():
        found[f"{name} median error"], found[f"{name} p90 error"] = float(each.median()), float(each.quantile(0.9))
    right, regrets = {}, []
    for group in _alternatives(steps):
        for name in METRICS:
            expected, real = group[f"predicted_{name}"].to_numpy(), group[f"measured_{name}"].to_numpy()
            for i, j in combinations(range(len(group)), 2):
                if max(real[i], real[j]) > (1 + DIFFER) * min(real[i], real[j]):
                    right[name, group.index[i], group.index[j]] = (expected[i] < expected[j]) == (real[i] < real[j])
        if len(group) > 1:
            front = _front(group[[f"predicted_{name}" for name in METRICS]].to_numpy())
            real = group[[f"measured_{name}" for name in METRICS]].to_numpy()
            regrets.append(float((real[front].min(0) / real.min(0) - 1).max()))
    pairs = len(right)
    found |= {"pairs that differ": pairs, "in the right order": sum(right.values()) / pairs if pairs else float("nan")}
    found["largest regret on the front"] = max(regrets, default=float("nan"))
    if traces is not None and len(traces):
        for name in ("p99_ttft_s", "goodput_req_s"):
            each = (traces[f"predicted_{name}"] / traces[f"measured_{name}"] - 1).abs()
            found[f"{name} largest error of {len(each)} traces"] = float(each.max())
    found["repeated"] = int(max(steps["repeated"].max(), 0 if traces is None else traces["repeated"].max()))
    found["dropped"] = int(max(steps["dropped"].max(), 0 if traces is None else traces["dropped"].max()))
    return found


def _alternatives(steps: Any) -> Iterator[Any]:
    """Strategies that one could choose from, under one load and one cap of the link. Those that were measured with one
    cap only do not use the link."""
    for _, group in steps.groupby(SAME_LOAD):
        cap = group["link_gb_s"].fillna(np.inf)
        alone = cap.groupby(group["strategy"]).transform("nunique") == 1
        for one in cap.unique():
            yield group[alone | (cap == one)]


def _front(points: Any) -> Any:
    """bool [N]: no other point is at least as good everywhere and better somewhere."""
    at_least = (points[None] <= points[:, None]).all(-1)
    better = (points[None] < points[:, None]).any(-1)
    return np.logical_not((at_least & better).any(axis=1))


def report(folder: Path) -> str:
    """Score what is in `folder`, and draw it."""
    matplotlib.use("Agg")
    from hybridlab.figures.agreement import predicted_measured

    steps = pd.read_csv(folder / "steps.csv")
    traces = pd.read_csv(folder / "traces.csv") if (folder / "traces.csv").exists() else None
    found = score(steps, traces)
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    figure: Any = predicted_measured(steps).figure
    for suffix in ("png", "pdf"):
        figure.savefig(folder / f"agreement.{suffix}", dpi=200, bbox_inches="tight")
    lines = [
        f"{name}: {value:.1%}" if isinstance(value, float) else f"{name}: {value}" for name, value in found.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
