"""How one byte becomes a number: the 256 FP8 codes and the two tables that the AVX-512 kernels decode them with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from hybridlab.figures.arguments import check_target
from hybridlab.figures.style import GREY, ONE_COLUMN_IN, cycle_color, new_axes, style
from hybridlab.number_formats import FP8_NAN_CODES, float32_to_bf16, fp8_values

if TYPE_CHECKING:
    import pandas as pd

SUBNORMAL = 8
"""Codes below it (sign apart) have no leading one: multiples of 2^-9."""

BEYOND = 1000.0
"""Where NaN is drawn: outside of the values, the largest of which is 448."""


def fp8_table() -> pd.DataFrame:
    """The 128 codes without sign: code, kind ("zero", "subnormal", "normal", "NaN"), value, bf16, low and high byte.

    `low` and `high` are the entries of the two byte tables; bit 7 of a code is not looked up, it becomes the sign.
    """
    import pandas as pd

    codes = np.arange(128)
    values = fp8_values()[codes]
    bits = np.where(np.isnan(values), 0x7FC0, float32_to_bf16(np.nan_to_num(values)))
    kinds = np.where(codes == 0, "zero", np.where(codes < SUBNORMAL, "subnormal", "normal")).astype(object)
    kinds[np.isnan(values)] = "NaN"
    columns = {"code": codes, "kind": kinds, "value": values, "bf16": bits, "low": bits & 0xFF, "high": bits >> 8}
    return pd.DataFrame(columns).set_index("code")


def fp8_codes(ax: Axes | None = None, *, width_in: float = ONE_COLUMN_IN) -> Axes:
    """Value over code for all 256 E4M3FN codes, on a logarithmic axis that is linear around zero.

    Each step of 8 codes is one exponent; subnormals, which shifts alone get wrong, and NaN are marked.
    """
    check_target(ax, width_in, "fp8_codes")
    values = fp8_values().astype(np.float64)
    codes = np.arange(256)
    subnormal = codes % 128 < SUBNORMAL
    with style():
        ax = new_axes(width_in, 2.4) if ax is None else ax
        normal: Any = {"linestyle": "none", "marker": ".", "markersize": 2.5}
        ax.plot(codes[~subnormal], values[~subnormal], **normal, color=cycle_color(0), label="normal")
        look: Any = {"linestyle": "none", "marker": "s", "markersize": 2.5}
        ax.plot(codes[subnormal], values[subnormal], **look, color=cycle_color(1), label="zero and subnormal")
        beyond = [BEYOND if code < 128 else -BEYOND for code in FP8_NAN_CODES]
        ax.plot(FP8_NAN_CODES, beyond, linestyle="none", marker="x", color=cycle_color(2), label="NaN (no value)")
        ax.axvline(127.5, color=GREY, linewidth=0.6, zorder=1)
        ax.set_yscale("symlog", linthresh=2.0**-6, linscale=0.6)
        ax.set_yticks([-448, -1, -(2.0**-6), 0, 2.0**-6, 1, 448], ["-448", "-1", "-1/64", "0", "1/64", "1", "448"])
        ax.minorticks_off()
        ax.set_xticks([0, 64, 128, 192, 255], ["0x00", "0x40", "0x80", "0xC0", "0xFF"])
        ax.set_xlim(-4, 259)
        ax.set_ylim(-3 * BEYOND, 3 * BEYOND)
        ax.set_xlabel("code; the highest bit is the sign")
        ax.set_ylabel("value")
        ax.legend(loc="upper right", fontsize=6)
    return ax
