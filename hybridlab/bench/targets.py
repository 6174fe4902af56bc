"""What the CPU kernels are to reach, held against a table of `bench kernels`. Thresholds are data: nothing fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

PREFERRED = ("deepseek-v3", "qwen3-235b-a22b", "qwen3-30b-a3b", "qwen3-7b-a1b", "tiny")
"""A target is read from the first of these that was measured; `point` says which."""


@dataclass(frozen=True)
class Target:
    """`column` of the rows that match `where`: the best layout's, and over several values of `over` the worst one's."""

    name: str
    must: float
    aim: float
    column: str
    where: dict[str, Any]
    over: str = "rows"
    best_threads: bool = False
    """Compare the fastest thread count of a peer with ours on all threads."""


def targets(most_threads: int) -> tuple[Target, ...]:
    """The targets that this command can measure, for a machine with that many threads."""
    one = {"work": "matrix", "matrix": "gate_up", "weights": "fp8", "contender": "hybridlab", "slow_tier": False}
    gemv = {**one, "rows": 1, "place": "memory"}
    every, read, slower = {"threads": most_threads}, "read_fraction", "times_slower"
    step, rival = {"work": "moe_step", "rows": 1}, {"work": "matrix", "matrix": "gate_up", "place": "memory"}
    slow = {**one, "rows": 1, "place": "memory", "threads": 1, "slow_tier": True}
    return (
        Target("GEMV / read, 1 thread", 0.92, 0.97, read, {**gemv, "threads": 1}),
        Target("GEMV / read, all threads", 0.90, 0.96, read, {**gemv, **every}),
        Target("GEMV in L3 / L3 read, all threads", 0.85, 0.93, read, {**one, "rows": 1, "place": "l3", **every}),
        Target("M = 16 to 64 / multiply, all threads", 0.88, 0.95, "multiply_fraction",
               {**one, "rows": [16, 32, 64], "place": "memory", **every}),
        Target("grouped prefill / multiply, all threads", 0.75, 0.90, "multiply_fraction",
               {"work": "moe_prefill", "contender": "hybridlab", "weights": "fp8", **every}),
        Target("MoE step, M = 1 / read, all threads", 0.88, 0.97, read,
               {**step, "contender": "hybridlab", "weights": "fp8", **every}),
        Target("kt-kernel FP8, MoE step, its best threads", 2.8, 4.5, slower,
               {**step, "contender": "kt_kernel"}, best_threads=True),
        Target("torch BF16, MoE step, M = 1", 3.0, 5.0, slower, {**step, "contender": "torch_bf16", **every}),
        Target("torch BF16, matrix, M = 64", 1.2, 1.4, slower,
               {**rival, "contender": "torch_bf16", "rows": 64, **every}),
        Target("torch FP8 dequantised, MoE step, M = 1", 50.0, 85.0, slower,
               {**step, "contender": "torch_fp8", **every}),
        Target("AVX-512 without VBMI / read, 1 thread", 0.60, 0.80, read,
               {**slow, "tier": ["avx512_bf16", "avx512_bw"]}, over="tier"),
        Target("AVX2 / read, 1 thread", 0.50, 0.60, read, {**slow, "tier": "avx2"}, over="tier"),
    )  # fmt: skip


def targets_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per target: target, measured, q1, q3 (the noise: quartiles over the trials), must, aim, point, evidence.

    What was not measured has NaN and an empty `point`.
    """
    import pandas as pd

    most = max(map(int, table["threads"])) if len(table) else 1
    found = []
    for target in targets(most):
        row = _row(table, target)
        names = [target.column, f"{target.column}_q1", f"{target.column}_q3"]
        numbers = [float("nan")] * 3 if row is None else [float(row[name]) for name in names]
        if row is not None and target.best_threads:
            numbers = _against_ours(table, row, most)
        found.append(
            {
                "target": target.name,
                **dict(zip(("measured", "q1", "q3"), numbers, strict=True)),
                "must": target.must,
                "aim": target.aim,
                "point": "" if row is None else _point(row),
                "evidence": "" if row is None else row["evidence"],
            }
        )
    return pd.DataFrame(found)


def _row(table: Any, target: Target) -> Any:
    """The row that the target is read from, or None."""
    for key, wanted in target.where.items():
        if not len(table):
            return None
        table = table[table[key].isin(wanted if isinstance(wanted, list) else [wanted])]
    models = [model for model in PREFERRED if (table["model"] == model).any()] if len(table) else []
    if not models:
        return None
    table = table[table["model"] == models[0]]
    if target.best_threads:
        return table.sort_values("call_s").iloc[0]
    best = [rows.sort_values(target.column).iloc[-1] for _, rows in table.groupby(target.over, sort=False)]
    return min(best, key=lambda row: row[target.column])


def _against_ours(table: Any, rival: Any, threads: int) -> list[float]:
    """How many times slower a peer's row is than our best layout of the same point on so many threads."""
    same = table[(table["contender"] == "hybridlab") & (table["weights"] == "fp8") & (table["threads"] == threads)]
    for key in ("work", "model", "rows"):
        same = same[same[key] == rival[key]]
    if not len(same):
        return [float("nan")] * 3
    ours = same.sort_values("call_s").iloc[0]
    return [
        rival["call_s"] / ours["call_s"],
        rival["call_s_q1"] / ours["call_s_q3"],
        rival["call_s_q3"] / ours["call_s_q1"],
    ]


def _point(row: Any) -> str:
    size = f" {row['n']:.0f}x{row['k']:.0f}" if row["work"] == "matrix" else ""
    rows = f"M = {row['rows']}"
    threads = f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"
    return f"{row['model']}{size}, {rows}, {threads}, {row['tier']}, {row['layout']}"


def shown(table: pd.DataFrame) -> str:
    """The targets as text of one line each; a mark says whether must (+) or aim (*) is reached."""
    lines = [f"  {'':1} {'target':42} {'measured':>8}  {'quartiles':>13}  {'must':>5} {'aim':>5}  point"]
    for row in table.to_dict("records"):
        if row["measured"] != row["measured"]:
            lines.append(
                f"  {'':1} {row['target']:42} {'-':>8}  {'':13}  {row['must']:5g} {row['aim']:5g}  not measured"
            )
            continue
        mark = "*" if row["measured"] >= row["aim"] else "+" if row["measured"] >= row["must"] else "-"
        noise = f"{_three(row['q1'])} to {_three(row['q3'])}"
        numbers = f"{_three(row['measured']):>8}  {noise:>13}  {row['must']:5g} {row['aim']:5g}"
        lines.append(f"  {mark} {row['target']:42} {numbers}  {row['point']}")
    return "\n".join(lines)


def _three(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.0f}"
