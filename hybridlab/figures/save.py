"""Figure files that say where they come from, and are the same bytes whenever they are made."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridlab import __version__
from hybridlab.errors import ConfigError
from hybridlab.figures.files import file_path, write_whole
from hybridlab.figures.origin import Origin, noted
from hybridlab.figures.style import style

FORMATS = (".png", ".svg", ".pdf")


def save_figure(
    drawn: Axes | Figure | Iterable[Axes],
    path: str | Path,
    *,
    command: str,
    run_ids: Sequence[str] | None = None,
    version: str = __version__,
) -> dict[str, Path]:
    """Write PNG, SVG, PDF and a JSON sidecar beside each other; returns the paths by suffix.

    `path` may carry one of those suffixes or none. Run ids, evidence, machine and code commit of the rows that
    the figure functions drew go into the metadata of each file and into the sidecar, with `command` and the
    `version` of hybridlab. `run_ids` is for figures drawn by other means. No file holds a time: the same tables
    give the same bytes with the same versions of the libraries. Raises ConfigError naming the file that cannot
    be written; then none is.
    """
    axes: list[Any] = [drawn] if isinstance(drawn, Axes | Figure) or not isinstance(drawn, Iterable) else list(drawn)
    if not axes or not all(isinstance(one, Axes | Figure) for one in axes):
        raise ConfigError("save_figure: nothing drawn; pass the Axes that a figure function returned")
    found: Any = axes[0] if isinstance(axes[0], Figure) else axes[0].figure
    figure = found.get_figure(root=True) or found
    origin = noted(figure)
    if run_ids is not None:
        origin = Origin(tuple(run_ids), origin.evidence, origin.machine, origin.code)
    path = file_path(path, "save_figure")
    stem = path.with_suffix("") if path.suffix in (*FORMATS, ".json") else path
    text = describe(origin, command, version)
    # A None leaves out what matplotlib would put there: the time.
    metadata: dict[str, dict[str, Any]] = {
        ".png": {"Title": stem.name, "Description": text},
        ".svg": {"Title": stem.name, "Description": text, "Date": None},
        ".pdf": {"Title": stem.name, "Subject": text, "CreationDate": None},
    }
    sidecar = {"figure": stem.name, "command": command, **origin.as_dict(), "hybridlab": version}
    files = {}
    # Font type and salt are read when the file is written, not when the figure is made.
    with style(), _laid_out(figure):
        for suffix in FORMATS:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix[1:], metadata=metadata[suffix])
            files[suffix] = buffer.getvalue()
    files[".json"] = (json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n").encode()
    written = {suffix: stem.with_name(stem.name + suffix) for suffix in files}
    write_whole({written[suffix]: content for suffix, content in files.items()}, "figure")
    return written


@contextmanager
def _laid_out(figure: Any) -> Iterator[None]:
    """The axes where the layout puts them, to a billionth of the figure.

    The layout's solver adds up in the order of addresses in memory, so that its last digits change from run to run, and
    with them the names of clip paths in an SVG.
    """
    engine = figure.get_layout_engine()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    was_in_layout = {ax: ax.get_in_layout() for ax in figure.axes}
    try:
        for ax in figure.axes:
            ax.set_position([round(number, 9) for number in ax.get_position(original=True).bounds])
        yield
    finally:
        for ax, flag in was_in_layout.items():
            ax.set_in_layout(flag)  # set_position took them out
        figure.set_layout_engine(engine)


def describe(origin: Origin, command: str, version: str) -> str:
    """One line: runs, evidence, machine, code, version, command."""
    return "; ".join(
        (
            f"hybridlab {version} runs {', '.join(origin.run_ids) or 'none'}",
            f"evidence {', '.join(origin.evidence) or 'unknown'}",
            f"machine {' and '.join(origin.machine) or 'unknown'}",
            f"code {', '.join(origin.code) or 'unknown'}",
            f"command: {command}",
        )
    )
