"""Where a drawn figure comes from: the figure functions note it, `save_figure` writes it into the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd

_NOTED: WeakKeyDictionary[Axes, Origin] = WeakKeyDictionary()


@dataclass(frozen=True)
class Origin:
    """The runs behind a figure; every field lists distinct values in order."""

    run_ids: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    machine: tuple[str, ...] = ()
    code: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, list[str]]:
        return {name: list(values) for name, values in asdict(self).items()}


def note_origin(ax: Axes, frames: Iterable[pd.DataFrame]) -> None:
    """Remember that the rows of `frames` are drawn on `ax`, beside those that already are."""
    frames = list(frames)
    found = origin_of(frames)
    _NOTED[ax] = _merged([_NOTED[ax], found]) if ax in _NOTED else found


def origin_of(frames: Iterable[pd.DataFrame]) -> Origin:
    """What the columns run_id, evidence, machine and code of the tables say."""
    columns = {"run_ids": "run_id", "evidence": "evidence", "machine": "machine", "code": "code"}
    found: dict[str, dict[str, None]] = {name: {} for name in columns}
    for frame in frames:
        for name, column in columns.items():
            if column in frame.columns:
                found[name] |= dict.fromkeys(str(value) for value in frame[column].unique())
    return Origin(**{name: tuple(values) for name, values in found.items()})


def noted(drawn: Axes | Figure | Iterable[Axes]) -> Origin:
    """What was noted for an Axes, for several, or for all of a figure."""
    axes = drawn.axes if isinstance(drawn, Figure) else [drawn] if isinstance(drawn, Axes) else list(drawn)
    return _merged(_NOTED[ax] for ax in axes if ax in _NOTED)


def _merged(origins: Iterable[Origin]) -> Origin:
    fields: Mapping[str, dict[str, None]] = {name: {} for name in Origin.__dataclass_fields__}
    for origin in origins:
        for name, values in fields.items():
            values.update(dict.fromkeys(getattr(origin, name)))
    return Origin(**{name: tuple(values) for name, values in fields.items()})
