"""Which points no other point beats on both axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hybridlab.errors import ConfigError
from hybridlab.figures.arguments import check_numbers

if TYPE_CHECKING:
    import pandas as pd


def pareto_front(df: pd.DataFrame, x: str = "output_tokens_per_s", y: str = "median_ttft_s") -> np.ndarray:
    """bool [rows]: True where no other row has more `x` and less `y` (one of the two may be equal).

    Equal rows are all on the front; rows with a NaN never are. Raises ConfigError naming a missing column.
    """
    if not hasattr(df, "columns"):
        raise ConfigError(f"pareto_front: expected a table, got {type(df).__name__}")
    for name in (x, y):
        if name not in df.columns:
            raise ConfigError(f"pareto_front: no column {name!r}; there are {', '.join(map(str, df.columns[:8]))}, ...")
        check_numbers(df, name, "pareto_front")
    return front_of(df[x].to_numpy(np.float64), df[y].to_numpy(np.float64))


def front_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """bool [points] for float64 [points] twice; see `pareto_front`."""
    front = np.zeros(len(x), dtype=bool)
    least, at = np.inf, np.nan  # the least y so far, and the x where it was found
    # From the greatest x down, so that only what came before can beat a point; among equal x the least y first.
    for i in np.lexsort((y, -x)):
        if np.isnan(x[i]) or np.isnan(y[i]):
            continue
        if y[i] < least or (y[i] == least and x[i] == at):
            front[i] = True
            least, at = y[i], x[i]
    return front
