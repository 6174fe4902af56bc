"""The controls of a panel: ipywidgets in, a `Choice` out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ipywidgets
from pydantic import ValidationError

from hybridlab.columns import EVIDENCE, LATENCIES, PERCENTILES
from hybridlab.errors import ConfigError
from hybridlab.figures.style import axis_label
from hybridlab.metrics import SLO, SLO_PRESETS, find_slo
from hybridlab.sections import did_you_mean, one_line
from hybridlab.widgets.drawing import VIEWS
from hybridlab.widgets.summary_rows import label
from hybridlab.widgets.table import PROVENANCE, Choice, ResultsTable

STORED, CUSTOM = "as stored", "custom"
LIMITS = ("ttft_s", "tpot_ms")
WIDTH_PX = 250
LETTER_PX, ROW_PX, LEAST_PX, MOST_PX, MOST_ROWS = 7.5, 18, 110, 285, 5


class Controls:
    """`named` sets what is drawn, `filters` (by column) which runs; `choice` is what all of them say.

    A preset of the SLO and its two limits stay in step: a named preset sets the limits, a limit set by hand
    makes it "custom".
    """

    def __init__(self, table: ResultsTable) -> None:
        if len(table.metrics) < 2:
            raise ConfigError("explore: expected a table with at least two numeric columns")
        metrics = [(_metric_label(name, table), name) for name in table.metrics]
        self._table = table
        self._narrowed: dict[str, tuple[str, ...]] = {}
        self._stored = _stored_slo(table) or SLO_PRESETS["paper"]
        self.named: dict[str, Any] = {
            "figure": _dropdown("figure", [(view.title, name) for name, view in VIEWS.items()], next(iter(VIEWS))),
            "by": _dropdown("lines", table.lines, _first(table.lines, "scheduler")),
            "x": _dropdown("x", metrics, _first(table.metrics, "output_tokens_per_s")),
            "y": _dropdown("y", metrics, _first(table.metrics, "median_ttft_s")),
            "percentile": _dropdown("percentile", PERCENTILES, "median"),
            "metric": _dropdown("latency", [(axis_label(name), name) for name in LATENCIES], LATENCIES[0]),
            "slo": _dropdown("SLO", [STORED, *SLO_PRESETS, CUSTOM], STORED),
            "ttft_s": _number("TTFT ≤ (s)", self._stored.ttft_s, step=0.1),
            "tpot_ms": _number("TPOT ≤ (ms)", self._stored.tpot_s * 1000, step=1),
            "band": ipywidgets.Checkbox(
                True, description="range of repeats", indent=False, layout={"width": f"{WIDTH_PX}px"}
            ),
        }
        self.filters = {name: _filter(tuple(table.values(name))) for name in table.filters}
        if "evidence" in self.filters:  # kinds are compared only when somebody asks for it
            kinds = self.filters["evidence"]
            kinds.value = [kind for kind in EVIDENCE if kind in kinds.options][:1]
        self._first = {name: control.value for name, control in self.filters.items()}

    def __iter__(self) -> Iterator[Any]:
        yield from (*self.named.values(), *self.filters.values())

    @property
    def choice(self) -> Choice:
        """What the controls say now. Raises ConfigError for limits that no SLO can have."""
        value = {name: control.value for name, control in self.named.items()}
        kept = {name: control.value for name, control in self.filters.items() if control.value != control.options}
        names = ("figure", "by", "x", "y", "metric", "percentile", "band")
        return Choice(**{name: value[name] for name in names}, slo=self._slo(), kept=kept)

    def follow(self, changed: Any) -> None:
        """Keep what belongs together in step after `changed` was set, and hide what the figure ignores."""
        preset = self.named["slo"]
        if changed is preset and preset.value != CUSTOM:
            slo = SLO_PRESETS.get(preset.value, self._stored)
            self.named["ttft_s"].value, self.named["tpot_ms"].value = slo.ttft_s, slo.tpot_s * 1000
        elif any(changed is self.named[name] for name in LIMITS):
            preset.value = CUSTOM
        if changed is self.named["figure"]:
            self._narrow()
        heeded = VIEWS[self.named["figure"].value].controls
        for name, control in self.named.items():
            shown = name == "figure" or ("slo" if name in LIMITS else name) in heeded
            control.layout.display = None if shown else "none"

    def _narrow(self) -> None:
        """For figures of requests, one value of what lines do not tell apart (the last: the highest load).

        Otherwise each load would be a line. Undone for other figures, unless somebody chose differently.
        """
        if VIEWS[self.named["figure"].value].table == "requests":
            for name in self._table.untold(self.choice):
                control = self.filters.get(name)
                if control is not None and name not in PROVENANCE and control.value == control.options:
                    control.value = self._narrowed[name] = control.options[-1:]
        else:
            for name, value in self._narrowed.items():
                if self.filters[name].value == value:
                    self.filters[name].value = self.filters[name].options
            self._narrowed.clear()

    def set(self, settings: Mapping[str, Any]) -> None:
        """Set controls from plain values, as `explore` takes them. Raises ConfigError naming the setting."""
        settings = dict(settings)
        keep, slo = settings.pop("keep", {}), settings.pop("slo", None)
        if slo is not None:
            self._set_slo(slo)
        for name, value in settings.items():
            _set(name, self.named[name], value)
            self.follow(self.named[name])
        if not isinstance(keep, Mapping):
            raise ConfigError(f"explore: keep: expected a mapping from columns to lists of values, got {keep!r:.60}")
        for name, values in keep.items():
            if name not in self.filters:
                raise ConfigError(f"explore: keep: no filter {name!r}{did_you_mean(str(name), self.filters)}")
            listed = values if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
            _set(f"keep: {name}", self.filters[name], tuple(map(label, listed)))

    def settings(self) -> dict[str, Any]:
        """The inverse of `set`, but for the figure: what the figure heeds, and filters that were changed."""
        choice = self.choice
        heeded = VIEWS[choice.figure].controls
        found = {name: getattr(choice, name) for name in ("by", "x", "y", "metric", "percentile") if name in heeded}
        if choice.slo is not None and "slo" in heeded:
            preset = SLO_PRESETS.get(choice.slo.name) == choice.slo
            found["slo"] = choice.slo.name if preset else {"ttft_s": choice.slo.ttft_s, "tpot_s": choice.slo.tpot_s}
        if not choice.band and "band" in heeded:
            found["band"] = False
        first = self._first | self._narrowed
        keep = {name: list(c.value) for name, c in self.filters.items() if c.value != first[name]}
        return found | ({"keep": keep} if keep else {})

    def _set_slo(self, slo: Any) -> None:
        found = find_slo(_make_slo(slo) if isinstance(slo, Mapping) else slo)
        preset = SLO_PRESETS.get(found.name) == found
        self.named["slo"].value = found.name if preset else CUSTOM
        self.named["ttft_s"].value, self.named["tpot_ms"].value = found.ttft_s, found.tpot_s * 1000

    def _slo(self) -> SLO | None:
        preset = self.named["slo"].value
        if preset == STORED:
            return None
        limits = {"ttft_s": self.named["ttft_s"].value, "tpot_s": self.named["tpot_ms"].value / 1000}
        return SLO_PRESETS[preset] if preset != CUSTOM else _make_slo(limits)


def _make_slo(limits: Mapping[str, Any]) -> SLO:
    try:
        return SLO.model_validate(limits)
    except ValidationError as error:
        raise ConfigError(f"slo: {one_line(error, {})}") from None


def _stored_slo(table: ResultsTable) -> SLO | None:
    """The SLO that all runs were stored with; None if they differ or name none."""
    columns = ["slo", "slo_ttft_s", "slo_tpot_s"]
    if not set(columns) <= set(table.summary.columns):
        return None
    frame: Any = table.summary[columns]
    found = frame.drop_duplicates().to_dict("records")
    if len(found) != 1:
        return None
    return _make_slo({"name": found[0]["slo"], "ttft_s": found[0]["slo_ttft_s"], "tpot_s": found[0]["slo_tpot_s"]})


def _metric_label(column: str, table: ResultsTable) -> str:
    """The label of an axis; the column's own name where another column has the same label."""
    text = axis_label(column)
    return text if [axis_label(name) for name in table.metrics].count(text) == 1 else column


def _first(names: Sequence[str], wanted: str) -> str:
    return wanted if wanted in names else names[0]


def _dropdown(description: str, options: Sequence[Any], value: str) -> Any:
    layout = {"width": f"{WIDTH_PX}px"}
    style = {"description_width": "72px"}
    return ipywidgets.Dropdown(options=options, value=value, description=description, layout=layout, style=style)


def _number(description: str, value: float, step: float) -> Any:
    # Sent on Enter or on leaving the field, so that half-typed numbers draw nothing.
    return ipywidgets.BoundedFloatText(
        value, min=1e-3, max=1e6, step=step, description=description, layout={"width": f"{WIDTH_PX}px"},
        style={"description_width": "92px"},
    )  # fmt: skip


def _filter(labels: Sequence[str]) -> Any:
    width_px = min(MOST_PX, max(LEAST_PX, 40 + LETTER_PX * max(map(len, labels))))
    height_px = 12 + ROW_PX * min(MOST_ROWS, max(2, len(labels)))
    return ipywidgets.SelectMultiple(
        options=labels, value=tuple(labels), layout={"width": f"{width_px:.0f}px", "height": f"{height_px}px"},
    )  # fmt: skip


def _set(name: str, control: Any, value: Any) -> None:
    from traitlets import TraitError

    try:
        control.value = value
    except TraitError:
        known = [option[1] if isinstance(option, tuple) else option for option in getattr(control, "options", ())]
        hint = f"; expected one of {', '.join(map(str, known))}" if known else ""
        raise ConfigError(f"explore: {name}: {value!r} is not to be had{hint}") from None
