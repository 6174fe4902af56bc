"""The `figures:` of an experiment: which figures, with which arguments. Checked here, without matplotlib.

Each entry is a figure's name or `{figure: NAME, name: FILE_STEM, width: one_column|two_columns,
where: {column: value or list}, ...arguments}`; the arguments are those of the function in hybridlab.figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator

from hybridlab.columns import LABELS, OF_A_SUMMARY, OF_THE_RUN, Evidence, Latency, Percentile
from hybridlab.errors import ConfigError
from hybridlab.metrics import REQUEST_COLUMNS, SLO, find_slo
from hybridlab.sections import Section, did_you_mean, one_line

# Names of files that lie beside the figures.
TAKEN = ("meta", "summary", "requests", "spans")
RUN_COLUMNS = (*OF_THE_RUN, "run_id")
# Columns that the tables of figures have beside labels, swept keys and `RUN_COLUMNS`.
SPAN_COLUMNS = ("lane", "kind", "layer", "part", "microbatch", "rank", "tier", "start_s", "end_s")
OWN_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "summary": ("experiment", "backend", *OF_A_SUMMARY),
    "requests": tuple(REQUEST_COLUMNS),
    "spans": SPAN_COLUMNS,
}


def _slo(value: Any) -> Any:
    try:
        return find_slo(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("slo: ")) from None


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple) and not value:
        raise ValueError("expected a name or a list of names, got an empty list")
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class FigureConfig(Section):
    """What every figure takes. `name` is the stem of its files (default: the figure's own name)."""

    table: ClassVar[str] = "summary"
    figure: str
    name: str | None = None
    width: Literal["one_column", "two_columns"] | None = None
    where: dict[str, Any] | None = None

    @field_validator("name")
    @classmethod
    def _file_stem(cls, value: str | None) -> str | None:
        if value is not None and (not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", value) or value in TAKEN):
            raise ValueError(f"expected a file name of letters, digits, '-' and '_', not {', '.join(TAKEN)}")
        return value

    @field_validator("where")
    @classmethod
    def _values(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for column, wanted in (value or {}).items():
            values = wanted if isinstance(wanted, list) and wanted else [wanted]
            if not all(isinstance(one, str | bool | int | float) for one in values):
                raise ValueError(f"{column}: expected a value or a list of values, got {wanted!r:.60}")
        return value

    @property
    def stem(self) -> str:
        return self.name or self.figure

    def arguments(self) -> dict[str, Any]:
        """The arguments of the figure's function that were given, `width` apart."""
        given = self.model_fields_set - {"figure", "name", "width"}
        return {name: getattr(self, name) for name in sorted(given)}


class _OfRuns(FigureConfig):
    by: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = None
    slo: Annotated[SLO | None, BeforeValidator(_slo)] = None
    evidence: Annotated[tuple[Evidence, ...] | None, BeforeValidator(_listed)] = None


class TtftThroughput(_OfRuns):
    figure: Literal["ttft_throughput"] = "ttft_throughput"
    load: str = "offered_req_s"
    ttft: Percentile = "median"
    front: bool = True


class LoadCurves(_OfRuns):
    figure: Literal["load_curves"] = "load_curves"
    load: str = "offered_req_s"
    tpot: Percentile = "median"


class TtftPromptLength(_OfRuns):
    table: ClassVar[str] = "requests"
    figure: Literal["ttft_prompt_length"] = "ttft_prompt_length"
    length: Literal["prompt_tokens", "computed_tokens"] = "prompt_tokens"


class LatencyCdf(_OfRuns):
    table: ClassVar[str] = "requests"
    figure: Literal["latency_cdf"] = "latency_cdf"
    metric: Latency = "ttft_s"


class Timeline(FigureConfig):
    table: ClassVar[str] = "spans"
    figure: Literal["timeline"] = "timeline"
    start_s: float | None = Field(default=None, ge=0)
    end_s: float | None = Field(default=None, gt=0)


FIGURES: dict[str, type[FigureConfig]] = {
    "ttft_throughput": TtftThroughput,
    "load_curves": LoadCurves,
    "ttft_prompt_length": TtftPromptLength,
    "latency_cdf": LatencyCdf,
    "timeline": Timeline,
}


def read_figures(value: Any) -> tuple[FigureConfig, ...]:
    """The checked entries of a `figures:` list. Raises ValueError naming the entry and what was expected."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list of figures, got {value!r:.60}")
    found = tuple(_entry(item, f"entry {number}") for number, item in enumerate(value, start=1))
    stems = [figure.stem.lower() for figure in found]
    for number, stem in enumerate(stems):
        if stem in stems[:number]:
            raise ValueError(f"entry {number + 1}: a second figure {found[number].stem!r}; give it a name of its own")
    return found


def check_columns(figures: Sequence[FigureConfig], swept: Iterable[str]) -> None:
    """Raise ConfigError for a column in `where`, `by` or `load` that the results of a config cannot have.

    `swept` are the dotted keys of its sweep; figures are drawn when all runs are done, which is late for a slip.
    """
    swept = list(dict.fromkeys(swept))
    likely = [*LABELS, *swept, *RUN_COLUMNS]
    for number, figure in enumerate(figures, start=1):
        known = {*likely, *OWN_COLUMNS[figure.table]}
        asked = [("where", name) for name in figure.where or ()]
        asked += [("by", name) for name in getattr(figure, "by", None) or ()]
        for argument, name in asked:
            if name not in known:
                hint = did_you_mean(name, likely)
                raise ConfigError(f"figures: entry {number} ({figure.figure}): {argument}: no column {name!r}{hint}")
        load = getattr(figure, "load", "offered_req_s")
        if load not in (*swept, *OF_A_SUMMARY):
            hint = did_you_mean(load, ["offered_req_s", *swept])
            raise ConfigError(f"figures: entry {number} ({figure.figure}): load: no number {load!r}{hint}")


def _entry(item: Any, where: str) -> FigureConfig:
    if isinstance(item, FigureConfig):
        return item
    raw = {"figure": item} if isinstance(item, str) else item
    if not isinstance(raw, Mapping) or not isinstance(raw.get("figure"), str):
        raise ValueError(f"{where}: expected a figure's name or a mapping with 'figure', got {item!r:.60}")
    kind = raw["figure"]
    if kind not in FIGURES:
        raise ValueError(f"{where}: unknown figure {kind!r}{did_you_mean(kind, FIGURES)}")
    try:
        return FIGURES[kind].model_validate(dict(raw))
    except ValidationError as error:
        raise ValueError(f"{where} ({kind}): {one_line(error)}") from None


Figures = Annotated[tuple[SerializeAsAny[FigureConfig], ...], BeforeValidator(read_figures)]
DEFAULT_FIGURES: tuple[FigureConfig, ...] = (TtftThroughput(),)
