"""Parameters of a `Machine` from measured ops: Levenberg-Marquardt on the cost model, exact derivatives by JAX.

What is minimised are logarithms of predicted / measured seconds, each weighted by the share that the op has in its
step: what is wanted are steps. Parameters are fitted as logarithms, shares between 0 and 1 as logits: no step can leave
their range. A weak prior keeps those where they start that the points say nothing of. Intervals are the 95% ones of the
linearised fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hybridlab.errors import ConfigError
from hybridlab.simulator.cost_model import Micro, OpClass, cost_model
from hybridlab.simulator.jax_setup import float64_on_cpu, import_jax
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.shapes import ModelShape

SHARES = frozenset(f"{lane}_{what}" for lane in ("cpu", "gpu") for what in ("overlap", "wide_read", "wide_expert_read"))
"""Parameters between 0 and 1."""
PRIOR = 0.005
"""A parameter that is a factor e from where it started counts as much as an error of 0.5% in one whole step."""
LEAST_WEIGHT = 0.002
EDGE = 0.02
"""Where a share starts that is given as 0 or 1: from the very edge there is no way back."""


@dataclass(frozen=True)
class Observed:
    """An op of class `cls` on microbatch `micro` took `seconds` while nothing ran beside it.

    `weight`: which share of their step all ops of this class take.
    """

    cls: OpClass
    micro: Micro
    seconds: float
    weight: float = 1.0


@dataclass(frozen=True)
class Fitted:
    """`machine` with the fitted parameters, by name the 95% interval of each, and what is left.

    `errors` [N]: predicted / measured - 1, in the order of the points.
    """

    machine: Machine
    intervals: dict[str, tuple[float, float]]
    errors: np.ndarray


def fit(machine: Machine, shape: ModelShape, points: Sequence[Observed], names: Sequence[str]) -> Fitted:
    """Fit the parameters `names`, which start at the machine's; the others stay.

    Raises `ConfigError` if scipy or jax is missing, or for fewer points than parameters.
    """
    if len(points) < len(names):
        raise ConfigError(f"fit: {len(points)} measured ops for {len(names)} parameters, expected as many at least")
    optimize, jax = _optimize(), import_jax()
    share = np.array([name in SHARES for name in names])
    start = np.array([float(getattr(machine, name)) for name in names])
    start = np.where(share, np.clip(start, EDGE, 1 - EDGE), np.maximum(start, 1e-9))

    def values(theta: Any) -> Any:
        return jax.numpy.where(share, jax.nn.sigmoid(theta), jax.numpy.exp(theta))

    groups = _groups(points)
    in_order = [point for group in groups for point in group]
    measured = np.array([point.seconds for point in in_order])
    weight = np.sqrt([max(point.weight, LEAST_WEIGHT) for point in in_order])
    first = np.where(share, np.log(start / (1 - np.where(share, start, 0.0))), np.log(start))

    def logs(theta: Any) -> Any:
        found = replace(machine, **dict(zip(names, values(theta), strict=True)))
        predicted = jax.numpy.concatenate([_predicted(found, shape, group, jax) for group in groups])
        return jax.numpy.log(predicted / measured)

    def residuals(theta: Any) -> Any:
        return jax.numpy.concatenate([weight * logs(theta), PRIOR * (theta - first)])

    with float64_on_cpu():
        compiled, slopes = jax.jit(residuals), jax.jit(jax.jacfwd(residuals))
        found = optimize.least_squares(
            lambda theta: np.asarray(compiled(theta)), first, lambda theta: np.asarray(slopes(theta)), method="lm"
        )
        errors = np.expm1(np.asarray(logs(found.x)))
        low, high = _interval(found, len(points))
        best, lows, highs = (np.asarray(values(each)) for each in (found.x, low, high))
    machine = replace(machine, **dict(zip(names, best.tolist(), strict=True)))
    machine.check("fit")
    intervals = {name: (float(a), float(b)) for name, a, b in zip(names, lows, highs, strict=True)}
    of_point = {id(point): error for point, error in zip(in_order, errors, strict=True)}
    return Fitted(machine, intervals, np.array([of_point[id(point)] for point in points]))


def _groups(points: Sequence[Observed]) -> list[list[Observed]]:
    """Points of one class side by side: they are predicted as one array."""
    groups: dict[tuple, list[Observed]] = {}
    for point in points:
        cls = point.cls
        groups.setdefault((cls.kind, cls.on_cpu, cls.num_experts, id(cls.chosen)), []).append(point)
    return list(groups.values())


def _predicted(machine: Machine, shape: ModelShape, group: Sequence[Observed], jax: Any) -> Any:
    numbers = [np.array([getattr(p.micro, f) for p in group], float) for f in ("tokens", "pairs", "context", "rows")]
    cls = replace(group[0].cls, microbatch=0)

    def one(*micro: Any) -> Any:
        return cost_model(machine, shape, [Micro(*micro)], jax.numpy)(cls).alone_s

    return jax.vmap(one)(*map(jax.numpy.asarray, numbers))


def _interval(found: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """95% of the linearised fit, in what was fitted; the prior makes the matrix invertible."""
    variance = 2 * found.cost / max(1, count - len(found.x)) * np.diag(np.linalg.inv(found.jac.T @ found.jac))
    wide = np.minimum(1.96 * np.sqrt(variance), 10.0)
    return found.x - wide, found.x + wide


def _optimize() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise ConfigError(
            f"fits need scipy, which cannot be imported ({error}): pip install 'hybridlab[jax]'"
        ) from None
    return optimize
