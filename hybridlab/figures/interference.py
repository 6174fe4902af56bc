"""What one long prompt costs those who decode: gaps between their tokens, alone and beside it, on each system.

The rows are those of `hybridlab.bench.interference` and `experiments/disaggregation/mixed.py`, one run a line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hybridlab.config import PAPER, project_dir
from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_target
from hybridlab.figures.files import file_path, read_lines
from hybridlab.figures.marks import evidence_handle, evidence_mark, put_legend
from hybridlab.figures.origin import note_origin
from hybridlab.figures.style import GREY, TWO_COLUMNS_IN, cycle_color, log_axis, new_axes, style
from hybridlab.figures.tables import Kinds, Where, chosen, rows_of

if TYPE_CHECKING:
    import pandas as pd

WHOLE, SPLIT = "one worker, whole prompts", "a worker for each"
KEYS = ["system", "num_decodes"]
ALONE = tuple(f"p{percent}_itl_s" for percent in (50, 90, 99))
BESIDE = tuple(f"p{percent}_window_itl_s" for percent in (50, 90, 99))
COLUMNS = (
    *KEYS, "mode", "long_ttft_s", "p50_tpot_s", "p99_tpot_s", *ALONE, *BESIDE, "output_tokens_per_s",
    "total_tokens_per_s",
)  # fmt: skip
SETTING = ("preset", "device", "threads", "prompt_tokens", "output_tokens", "chunk_tokens", "machine", "code")
"""What must be the same in all rows of a table or figure."""
MARKS = (("|", "p50"), ("o", "p90"), (">", "p99"))
ROW_IN, FRAME_IN = 0.17, 0.75
APART = 0.18
"""Of a row: how far the bar alone lies above the one beside the prompt."""


def read_interference(folder: str | Path | None = None) -> pd.DataFrame:
    """The rows of `folder`/mixed.jsonl, by default of the project's results/paper/disaggregation.

    Raises ConfigError if they are missing or damaged.
    """

    folder = project_dir() / "results" / PAPER / "disaggregation" if folder is None else Path(folder)
    path = file_path(folder, "read_interference") / "mixed.jsonl"
    return read_lines(path, (*COLUMNS, "evidence", "machine", "code"))


def interference_table(df: pd.DataFrame, *, where: Where | None = None, evidence: Kinds | None = None) -> pd.DataFrame:
    """A row per system and number of decodes, medians over the repeats: alone beside mixed.

    TTFT in seconds, of the long prompt by itself and beside the decodes; TPOT and ITL in ms. `p99 x` and `TPOT x` are
    mixed over alone on the same system, of p99 ITL while the prompt is computed and of p99 TPOT; `tokens/s x` is the
    output rate of the mixed run over that of "one worker, whole prompts" with as many decodes. NaN where not measured.
    """
    import pandas as pd

    alone, mixed, prompt_s = _medians(df, "interference_table", where, evidence)
    if not len(mixed):
        raise ConfigError("interference_table: no rows of mode 'mixed'")
    alone = alone.reindex(mixed.index)
    rates: dict[Any, float] = mixed["output_tokens_per_s"].to_dict()
    found: dict[str, Any] = {
        "TTFT alone": [prompt_s.get(system) for system, _ in mixed.index],
        "TTFT mixed": mixed["long_ttft_s"],
        "TPOT p50 alone": 1e3 * alone["p50_tpot_s"],
        "TPOT p50 mixed": 1e3 * mixed["p50_tpot_s"],
    }
    for percent, before, beside in zip((50, 90, 99), ALONE, BESIDE, strict=True):
        found |= {f"ITL p{percent} alone": 1e3 * alone[before], f"ITL p{percent} mixed": 1e3 * mixed[beside]}
    found |= {
        "p99 x": mixed["p99_window_itl_s"] / alone["p99_itl_s"],
        "TPOT x": mixed["p99_tpot_s"] / alone["p99_tpot_s"],
        "tokens/s": mixed["output_tokens_per_s"],
        "tokens/s x": [rate / rates.get((WHOLE, load), float("nan")) for (_, load), rate in rates.items()],
    }
    return pd.DataFrame(found, index=mixed.index).reset_index()


def claim_table(df: pd.DataFrame, *, where: Where | None = None, evidence: Kinds | None = None) -> pd.DataFrame:
    """The paper's claim, +50% throughput at < 15% latency increase, in one row per number of decodes of the split.

    All of the same runs, in percent: output tokens/s of the mixed run beyond whole prompts on one worker, and beyond
    the better of the two colocated systems; p50 and p99 TPOT, and p99 ITL while the prompt is computed, beyond the
    same decodes alone on the same system; TTFT beyond the prompt alone on it.
    """
    import pandas as pd

    alone, mixed, prompt_s = _medians(df, "claim_table", where, evidence)
    split: Any = mixed[mixed.index.get_level_values("system") == SPLIT].droplevel("system")
    colocated: Any = mixed[mixed.index.get_level_values("system") != SPLIT]
    if not len(split) or not len(colocated):
        raise ConfigError(f"claim_table: needs rows of mode 'mixed' of {SPLIT!r} and of one worker")
    before: Any = alone[alone.index.get_level_values("system") == SPLIT].droplevel("system").reindex(split.index)
    best = colocated["output_tokens_per_s"].groupby("num_decodes").max()
    whole = {load: rate for (system, load), rate in colocated["output_tokens_per_s"].items() if system == WHOLE}
    rates = split["output_tokens_per_s"]
    ratios = {
        "tokens/s over whole prompts": rates / pd.Series(whole),
        "tokens/s over the best of one worker": rates / best,
        "p50 TPOT": split["p50_tpot_s"] / before["p50_tpot_s"],
        "p99 TPOT": split["p99_tpot_s"] / before["p99_tpot_s"],
        "p99 ITL beside the prompt": split["p99_window_itl_s"] / before["p99_itl_s"],
        "TTFT": split["long_ttft_s"] / prompt_s.get(SPLIT, float("nan")),
    }
    found = pd.DataFrame({name: 100 * (ratio - 1) for name, ratio in ratios.items()}).reindex(split.index)
    return found.reset_index()


def interference(
    df: pd.DataFrame,
    ax: Axes | None = None,
    *,
    where: Where | None = None,
    evidence: Kinds | None = None,
    width_in: float = TWO_COLUMNS_IN,
) -> Axes:
    """Gaps between tokens (ms, log) of each system and number of decodes: bars from p50 over p90 to p99.

    The thin grey bar is the decodes alone, the broad one those while the long prompt is computed; medians over the
    repeats. `where` picks rows by column, `evidence` asks for kinds to be compared. Raises ConfigError naming a missing
    column, kinds mixed unasked, or rows of several settings (`SETTING`).
    """
    what = "interference"
    check_target(ax, width_in, what)
    rows = _rows(df, what, where, evidence)
    kinds = list(dict.fromkeys(rows["evidence"]))
    medians = rows.groupby([*KEYS, "evidence", "mode"], sort=False).median(numeric_only=True)
    if not len(rows[rows["mode"] == "mixed"]):
        raise ConfigError(f"{what}: no rows of mode 'mixed'")
    mixed: Any = medians.xs("mixed", level="mode")
    alone: dict[Any, Any] = {key: row for key, row in medians.xs("alone", level="mode").iterrows()}
    names = list(dict.fromkeys(mixed.index.get_level_values("system")))
    beside = mixed.loc[sorted(mixed.index, key=lambda key: (names.index(key[0]), key[1], kinds.index(key[2])))]
    at = [float(i + 0.6 * names.index(system)) for i, (system, _, _) in enumerate(beside.index)]
    with style():
        own = ax is None
        ax = new_axes(width_in, FRAME_IN + ROW_IN * (at[-1] + 1)) if ax is None else ax
        for y, (key, row) in zip(at, beside.iterrows(), strict=True):
            color, line = cycle_color(names.index(key[0])), evidence_mark(key[2]).linestyle
            if key in alone:
                _bar(ax, y - APART, [1e3 * alone[key][name] for name in ALONE], GREY, 0.8, line, 2.5)
            _bar(ax, y + APART, [1e3 * row[name] for name in BESIDE], color, 1.8, line, 4.0)
        ax.set_yticks(at, [_count(load) + _kind(kind, kinds) for _, load, kind in beside.index])
        ax.set_ylim(at[-1] + 0.7, -0.7)
        ax.set_xlabel("ITL (ms)")
        ax.grid(visible=False, axis="y")
        log_axis(ax, "x")
        systems = [Line2D([], [], color=cycle_color(i), linewidth=1.8, label=name) for i, name in enumerate(names)]
        marks: list[Any] = [Line2D([], [], color=GREY, linewidth=0.8, label="decodes alone")]
        marks += [Line2D([], [], color=GREY, linestyle="", marker=m, markersize=4, label=name) for m, name in MARKS]
        put_legend(ax, systems, [*marks, *(evidence_handle(kind) for kind in kinds)], below=own)
    note_origin(ax, [rows])
    return ax


def _bar(ax: Axes, y: float, values_ms: list[float], color: str, width: float, line: Any, size: float) -> None:
    look: dict[str, Any] = {"color": color, "zorder": 3}
    ax.plot([values_ms[0], values_ms[-1]], [y, y], **look, linewidth=width, linestyle="-" if line == "none" else line)
    for (marker, _), value in zip(MARKS, values_ms, strict=True):
        ax.plot(value, y, marker=marker, markersize=size, **look)


def _count(load: int) -> str:
    return f"{load} decode" if load == 1 else f"{load} decodes"


def _kind(kind: str, kinds: list[str]) -> str:
    return f", {kind}" if len(kinds) > 1 else ""


def _rows(df: Any, what: str, where: Where | None, evidence: Kinds | None) -> Any:
    frame: Any = chosen(rows_of(df, "rows", COLUMNS, what), where, evidence, what)
    for column in SETTING:
        values = list(dict.fromkeys(frame[column].dropna())) if column in frame.columns else []
        if len(values) > 1 and frame["evidence"].nunique() == 1:
            shown = ", ".join(map(repr, values[:4]))
            raise ConfigError(
                f"{what}: rows differ in {column!r} ({shown}); choose with where={{{column!r}: {values[0]!r}}}"
            )
    return frame


def _medians(df: Any, what: str, where: Where | None, evidence: Kinds | None) -> tuple[Any, Any, dict[str, float]]:
    """By system and number of decodes: those alone, those mixed; and the prompt alone, in seconds."""
    rows = _rows(df, what, where, evidence)
    if rows["evidence"].nunique() > 1:
        raise ConfigError(f"{what}: rows are of several kinds; ask for one: evidence={rows['evidence'].iloc[0]!r}")
    parts = {mode: rows[rows["mode"] == mode] for mode in ("alone", "mixed")}
    alone, mixed = (part.groupby(KEYS, sort=False).median(numeric_only=True) for part in parts.values())
    prompts = parts["alone"][parts["alone"]["num_decodes"] == 0]
    return alone, mixed, prompts.groupby("system")["long_ttft_s"].median().to_dict()
