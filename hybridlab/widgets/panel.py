"""The panel: a figure beside its controls. Every change draws anew; a failure is one line of text in the panel."""

from __future__ import annotations

import base64
import gc
import html
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets

from hybridlab.config import project_dir
from hybridlab.errors import ConfigError, HybridlabError
from hybridlab.sections import did_you_mean
from hybridlab.widgets.controls import Controls
from hybridlab.widgets.drawing import VIEWS, WIDTH_IN, picture, save_picture, small_png
from hybridlab.widgets.table import ResultsTable, open_results

MAX_PX = 900
FIGURE_PX = round(WIDTH_IN * 100)
SETTINGS = ("by", "x", "y", "metric", "percentile", "slo", "band", "keep")


def explore(
    source: Any, *, figure: str = "ttft_throughput", results_dir: str | Path | None = None, **settings: Any
) -> Panel:
    """A panel to explore stored results: `source` is an experiment's name, a result, or rows of its summary.

    `figure` is the one shown first. `settings` set controls, as the panel's `code` writes them: by, x, y, metric,
    percentile, slo (a preset or {ttft_s, tpot_s}), band, keep ({column: values}). The panel works on copies.
    Goodput at another SLO and figures of single requests need a name or a result. Raises ConfigError if there is
    nothing to show.
    """
    if figure not in VIEWS:
        raise ConfigError(f"explore: figure: unknown {figure!r}{did_you_mean(str(figure), VIEWS)}")
    for name in settings:
        if name not in SETTINGS:
            raise ConfigError(f"explore: unknown setting {name!r}{did_you_mean(name, SETTINGS)}")
    table = open_results(source, results_dir)
    controls = Controls(table)
    controls.set({"figure": figure, **settings})
    return Panel(table, controls, results_dir)


class Panel:
    """All of it is in `widget`; `controls.named` and `controls.filters` hold the single controls.

    Setting `.value` of one draws the figure, with or without a browser. `png` is the picture shown, `message` the
    line under it. Where widgets cannot render, the picture and a line of text stand in for the panel.
    """

    def __init__(self, table: ResultsTable, controls: Controls, results_dir: str | Path | None = None) -> None:
        self.table = table
        self.controls = controls
        self.png = b""
        self.message = ""
        self._results_dir = results_dir
        self._following = False
        self.image = ipywidgets.Image(format="png", layout={"width": f"{FIGURE_PX}px", "max_width": "100%"})
        self.line = ipywidgets.HTML()
        self.file_name = ipywidgets.Text(
            f"results/{f'{table.name}/' if table.name else ''}explored", description="file", layout={"width": "400px"},
            style={"description_width": "32px"},
        )  # fmt: skip
        self.save_button = ipywidgets.Button(
            description="save figure", icon="save", tooltip="PDF, SVG, PNG at print size, and JSON that names the runs"
        )
        self.widget = self._arranged()
        for control in controls:
            control.observe(self._guarded(self._changed), names="value")
        self.save_button.on_click(self._guarded(lambda _: self.save()))
        self._guarded(lambda _: self._changed(None))(None)

    @property
    def code(self) -> str:
        """The call that gives this panel as it stands."""
        source = repr(self.table.name) if self.table.from_store else "df"
        where = {} if self._results_dir is None else {"results_dir": str(self._results_dir)}
        arguments = {"figure": self.controls.choice.figure, **where, **self.controls.settings()}
        return f"hl.explore({', '.join([source, *(f'{name}={value!r}' for name, value in arguments.items())])})"

    def save(self) -> dict[str, Path]:
        """Write the figure at print size as PDF, SVG, PNG and sidecar; returns the paths by suffix.

        The name is that in the panel; relative ones start at the project. Raises ConfigError if that fails.
        """
        name = self.file_name.value.strip()
        if not name:
            raise ConfigError("file: expected a name to save the figure under")
        written = save_picture(self.table, self.controls.choice, project_dir() / name, self.code)
        kinds = ", ".join(sorted(suffix[1:] for suffix in written))
        self._say(f"saved {(Path(name).parent / written['.json'].stem).as_posix()} as {kinds}")
        return written

    def _changed(self, change: Any) -> None:
        if self._following:
            return
        self._following = True  # what follows from this change is part of it, and drawn with it
        try:
            self.controls.follow(None if change is None else change["owner"])
        finally:
            self._following = False
        with warnings.catch_warnings(record=True) as caught, _collector_held():
            warnings.simplefilter("always")
            png, rows = picture(self.table, self.controls.choice)
            self.png = self.image.value = png
        shown = f"{len(rows.run_ids)} of {len(self.table.summary)} runs"
        self._say("; ".join(dict.fromkeys([shown, *rows.remarks, *(str(one.message) for one in caught)])))

    def _guarded(self, action: Callable[[Any], Any]) -> Callable[[Any], None]:
        """`action`, whose failure becomes a line in the panel: the picture stays, and so do the controls."""

        def guarded(argument: Any) -> None:
            try:
                action(argument)
            except HybridlabError as error:
                self._say(str(error), wrong=True)
            except Exception as error:
                logging.getLogger(__name__).debug("panel", exc_info=True)
                self._say(f"{type(error).__name__}: {error}", wrong=True)

        return guarded

    def _say(self, text: str, wrong: bool = False) -> None:
        self.message = " ".join(text.split())
        stays = " (the figure above is the last one that could be drawn)" if wrong and self.png else ""
        color = "#b3261e" if wrong else "#5b5b5b"
        self.line.value = f"<span style='color:{color};line-height:1.3'>{html.escape(self.message + stays)}</span>"

    def _arranged(self) -> Any:
        named = self.controls.named
        left = ipywidgets.VBox([named[name] for name in named])
        right = ipywidgets.VBox([self.image, self.line], layout={"max_width": f"{FIGURE_PX + 8}px"})
        filters = [
            ipywidgets.VBox([ipywidgets.HTML(f"<b>{html.escape(name)}</b>"), control])
            for name, control in self.controls.filters.items()
        ]
        wrapped = {"flex_flow": "row wrap", "grid_gap": "4px 10px"}
        parts = [
            ipywidgets.HBox([left, right], layout=wrapped),
            ipywidgets.HTML("runs shown (Ctrl-click: several, Ctrl-A: all)"),
            ipywidgets.HBox(filters, layout=wrapped),
            ipywidgets.HBox([self.file_name, self.save_button]),
        ]
        return ipywidgets.VBox(parts, layout={"max_width": f"{MAX_PX}px"})

    def __repr__(self) -> str:
        title = VIEWS[self.controls.choice.figure].title
        name = self.table.name or "results"
        return f"Panel({name}: {title}, {self.message}); its controls work in a running notebook"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The widget, and for viewers that cannot show it (GitHub, PDF) the picture and a line of text."""
        picture = {"image/png": base64.b64encode(small_png(self.png)).decode("ascii")} if self.png else {}
        return {**self.widget._repr_mimebundle_(), **picture, "text/plain": repr(self)}


@contextmanager
def _collector_held() -> Iterator[None]:
    """Put garbage collection off: a pass over all that torch and pandas hold takes as long as a picture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
