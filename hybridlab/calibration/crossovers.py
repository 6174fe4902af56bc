"""From seconds over sizes of steps to the sizes from which one path beats another.

A threshold is where switching costs least over all measured sizes (the sum of logarithms of the chosen path's seconds),
so that one noisy point moves it little; between two sizes it is where the straight lines in log-log cross.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, exp, inf, log
from typing import NamedTuple

from hybridlab.spec import NEVER

MARGIN = 0.02
"""By what share a path must be faster than a simpler one to be preferred; less is noise."""

Curve = Mapping[int, float]
"""Size of a step -> seconds; a size that was left out because the path was far behind counts as infinitely slow."""
Noise = Mapping[int, float]
"""Size of a step -> by what share repeats differ; so much more than `MARGIN` must a path gain to be preferred there."""


class MixedRange(NamedTuple):
    """Sizes `begin` to `end` (excluded) in which the mixed path is faster than the two others.

    `saved` sums the logarithms of by how much over the measured sizes, `gain` is their geometric mean as a factor.
    """

    begin: int
    end: int
    saved: float
    gain: float


def crossover(before: Curve, after: Curve, noise: Noise | None = None) -> int:
    """The size from which `after` is faster; `NEVER` if it is not, the smallest size if it always is.

    `noise` is of `after`.
    """
    sizes = sorted({*before, *after})
    costs = _costs(sizes, before), _costs(sizes, after, noise or {}, MARGIN)
    switch = min(range(len(sizes), -1, -1), key=lambda i: sum(costs[0][:i]) + sum(costs[1][i:]))  # ties: the later
    return _size_of(switch, sizes, before, after)


def mixed_range(cpu: Curve, mixed: Curve, streamed: Curve, noise: Noise | None = None) -> MixedRange:
    """Where `mixed` takes over from `cpu`, and `streamed` from it; from `NEVER` on if it is nowhere the fastest.

    `noise` is of `mixed`.
    """
    sizes = sorted({*cpu, *mixed, *streamed})
    costs = _costs(sizes, cpu), _costs(sizes, mixed, noise or {}, MARGIN), _costs(sizes, streamed)
    pairs = [(i, j) for i in range(len(sizes) + 1) for j in range(i, len(sizes) + 1)]

    def cost(pair: tuple[int, int]) -> float:
        i, j = pair
        return sum(costs[0][:i]) + sum(costs[1][i:j]) + sum(costs[2][j:])

    i, j = min(pairs, key=lambda pair: (cost(pair), pair[1] - pair[0]))
    if i == j:
        return MixedRange(NEVER, crossover(cpu, streamed), 0.0, 1.0)
    begin, end = _size_of(i, sizes, cpu, mixed), _size_of(j, sizes, mixed, streamed)
    ratios = [min(cpu.get(size, inf), streamed.get(size, inf)) / mixed[size] for size in sizes[i:j]]
    saved = [log(ratio) for ratio in ratios if ratio < inf]
    return MixedRange(begin, end, sum(saved), exp(sum(saved) / max(1, len(saved))))


def _costs(sizes: Sequence[int], curve: Curve, noise: Noise | None = None, margin: float = 0.0) -> list[float]:
    return [log(curve[n]) + margin + (noise or {}).get(n, 0.0) if n in curve else inf for n in sizes]


def _size_of(switch: int, sizes: Sequence[int], before: Curve, after: Curve) -> int:
    """The size at which lines through the points beside the switch cross; one of those points if they do not."""
    if switch == len(sizes):
        return NEVER
    low, high = sizes[switch - 1], sizes[switch]
    if switch == 0 or not {low, high} <= before.keys() & after.keys():
        return high
    lead, lag = log(after[low] / before[low]), log(before[high] / after[high])
    if lead <= 0:  # within the margin, or noise: no later than this
        return low + 1
    if lag < 0:
        return high
    at = log(low) + (log(high) - log(low)) * lead / (lead + lag)
    return min(high, max(low + 1, ceil(round(exp(at), 6))))
