"""What `hl.tune` returns: the best config, and the candidates with what was predicted and what was measured."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.config import ExperimentConfig
from hybridlab.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 10
"""Candidates that are listed, beside those that were run."""


@dataclass(frozen=True, repr=False)
class Tuned:
    """`config` is an experiment of the best candidate: `hl.run(tuned.config)`, or `tuned.save("best.yaml")`.

    `table` has a row per candidate, the best first: its settings, and of goodput, p99 TTFT and p99 TPOT what was
    "predicted" on the simulator and, for `runs` of them, what was "measured" on the engine. Of `size` candidates in the
    space the others were not looked at. `complete` is false if it was interrupted: calling again goes on.
    """

    config: ExperimentConfig
    table: pd.DataFrame
    size: int
    runs: int
    complete: bool

    def save(self, path: str | Path) -> Path:
        """Write the config as YAML. Raises ConfigError for a strategy that was given as an object."""
        import yaml

        path = Path(path)
        try:
            text = yaml.safe_dump(plain(self.config.to_dict()), sort_keys=False)
        except yaml.YAMLError:
            raise ConfigError(f"{path}: a strategy given as an object cannot be written; give its name") from None
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
        return path

    @property
    def shown(self) -> pd.DataFrame:
        """The rows that one looks at: those measured, and the best of the others."""
        measured = self.table["measured_goodput_req_s"].notna()
        return self.table.loc[measured | (self.table.index < SHOWN)]

    @property
    def title(self) -> str:
        """How much was looked at."""
        seen = f"{len(self.table)} of {self.size} candidates simulated, {self.runs} run on the engine"
        return f"{self.config.slo}; {seen}{'' if self.complete else '; interrupted, calling again goes on'}"

    def __str__(self) -> str:
        return f"{self.title}\n{self.shown.to_string(index=False, float_format=lambda x: f'{x:.4g}', na_rep='')}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = self.shown.to_html(index=False, float_format=lambda x: f"{x:.4g}", border=0, na_rep="")
        return f"<p><b>{html.escape(self.title)}</b></p>{table}"


def plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
