"""Figure files that say where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybridlab.errors import ConfigError
from hybridlab.figures.style import RC

FORMATS = (".png", ".svg", ".pdf")


def save_figure(drawn: Axes | Figure, path: str | Path, *, run_ids: Sequence[str], command: str) -> dict[str, Path]:
    """Write PNG, SVG, PDF and a JSON sidecar beside each other; returns the paths by suffix.

    `path` may carry one of those suffixes or none. The run ids and the command that made the figure go into
    the metadata of each file and into the sidecar. Raises ConfigError naming the file that cannot be written.
    """
    found = drawn.figure if isinstance(drawn, Axes) else drawn
    figure = found.get_figure(root=True) or found
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (*FORMATS, ".json") else path
    origin = f"hybridlab runs {', '.join(run_ids) or 'none'}; command: {command}"
    now = datetime.now(UTC)
    metadata = {
        ".png": {"Title": stem.name, "Description": origin},
        ".svg": {"Title": stem.name, "Description": origin},
        ".pdf": {"Title": stem.name, "Subject": origin},
    }
    written = {}
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        # fonttype is read when the file is written, not when the figure is made
        with mpl.rc_context(dict(RC)):
            for suffix in FORMATS:
                written[suffix] = stem.with_name(stem.name + suffix)
                figure.savefig(written[suffix], metadata=metadata[suffix])
        sidecar = {"figure": stem.name, "run_ids": list(run_ids), "command": command, "made": now.isoformat()}
        written[".json"] = stem.with_name(stem.name + ".json")
        written[".json"].write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{stem}: figure cannot be written ({error.strerror or error})") from None
    return written
