"""What a few measured layers say of many."""

from __future__ import annotations

import pytest

from hybridlab.bench.steps import TimedStep
from hybridlab.calibration.steps import _timing
from hybridlab.plans import Lane, LaneKind, Op, Span

LAYERS = 3


def spans(kind: str, lane: LaneKind, times: list[tuple[float, float]]) -> list[Span]:
    """One op of `kind` for each layer, with these starts and ends."""
    ops = (Op(10 * layer + len(kind), kind, Lane("main", lane), layer=layer) for layer in range(LAYERS))
    return [Span(op, *time) for op, time in zip(ops, times, strict=True)]


SUMS = spans("combine", LaneKind.GPU, [(9.0, 9.1), (9.6, 9.7), (10.2, 10.3)])
LOADS = spans("load", LaneKind.H2D, [(0.0, 3.0), (3.0, 6.0), (6.0, 9.0)])
HOST = spans("experts", LaneKind.CPU, [(0.5, 8.5), (9.1, 9.6), (9.7, 10.2)])


def test_loads_that_ran_ahead_are_not_gone_in_a_mixed_step():
    timing = _timing(TimedStep(10.3, [*SUMS, *LOADS, *HOST]), 48)
    assert timing.link_s == pytest.approx(3.0)
    # The gaps are 0.6 s; but of many layers each needs the link for 3 s, and the CPU for (8 + 0.5 + 0.5) / 3.
    assert timing.layer_s == pytest.approx(3.0)
    assert timing.step_s == pytest.approx(9.1 + 47 * 3.0)


@pytest.mark.parametrize("one_path", [HOST, LOADS])
def test_a_step_of_one_path_takes_what_lies_between_its_layers(one_path):
    timing = _timing(TimedStep(10.3, [*SUMS, *one_path]), 48)
    assert timing.layer_s == pytest.approx(0.6)
