"""`bench kernels`: shapes, fractions on a clock of our own, targets, and one short run on the real machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hybridlab import kernels
from hybridlab.bench import kernels as bench_kernels
from hybridlab.bench import peers as bench_peers
from hybridlab.bench.contenders import OurLayer, experts_used, routings
from hybridlab.bench.peers import layer_peers
from hybridlab.bench.plan import PREFILL_EXPERTS, Settings, sections
from hybridlab.bench.shapes import LAYERS, LayerShape, distinct_layers, layers_of, matrices_of
from hybridlab.bench.targets import shown, targets_table
from hybridlab.bench.timing import LEAST_TRIALS, Reading, Work, row_of, time_together
from hybridlab.bench.weights import WeightPool
from hybridlab.checkpoint.presets import PRESETS
from hybridlab.errors import ConfigError
from hybridlab.number_formats import FP8_NAN_CODES

compiled = pytest.mark.skipif(
    kernels.tier() == "numpy", reason="times compiled kernels, which this build lacks or HYBRIDLAB_ISA turns off"
)


class Machine:
    """A clock that work and yardstick move: reads at 10 GB/s, multiplies at 100 GFLOP/s, drifting if asked to."""

    loop = 0

    def __init__(self, drift: float = 1.0) -> None:
        self.now_s, self.speed, self.drift, self.rested_s = 0.0, 1.0, drift, 0.0

    def clock(self) -> float:
        return self.now_s

    def rest(self, seconds: float) -> None:
        self.rested_s += seconds
        self.now_s += seconds

    def measure(self) -> Reading:
        self.now_s += 0.001
        self.speed *= self.drift
        return Reading(10e9 * self.speed, 100e9 * self.speed)

    def work(self, num_bytes: float, share: float, **extra: Any) -> Work:
        def call() -> None:
            self.now_s += num_bytes / (10e9 * self.speed * share)

        return Work({"slow_tier": False}, [call], num_bytes, 4 * num_bytes, **extra)


def timed(machine: Machine, *works: Work, seconds: float = 0.2) -> list[dict[str, Any]]:
    samples = time_together(works, machine, seconds, clock=machine.clock, rest=machine.rest)
    return [row_of(work, one, samples[0]) for work, one in zip(works, samples, strict=True)]


def test_fractions_are_of_the_ceilings_around_each_trial() -> None:
    machine = Machine()
    fast, slow = timed(machine, machine.work(1e6, 0.9), machine.work(2e6, 0.5, settle_s=0.001))
    assert fast["read_fraction"] == pytest.approx(0.9)
    assert fast["weights_gb_s"] == pytest.approx(9.0)
    assert fast["multiply_fraction"] == pytest.approx(4 * 9e9 / 100e9)
    assert fast["flop_per_byte"] == 4
    assert fast["times_slower"] == pytest.approx(1.0)
    assert slow["times_slower"] == pytest.approx(2 / 0.5 * 0.9)
    assert machine.rested_s == pytest.approx(0.001 * slow["trials"])


def test_a_drifting_machine_changes_rates_but_not_fractions() -> None:
    machine = Machine(drift=0.97)
    row, other = timed(machine, machine.work(1e6, 0.8), machine.work(1e6, 0.8))
    assert row["trials"] > 10
    assert row["call_s_q3"] > 1.1 * row["call_s_q1"]
    assert row["read_fraction_q1"] == pytest.approx(0.8, rel=0.02)
    assert row["read_fraction_q3"] == pytest.approx(0.8, rel=0.02)
    assert other["times_slower"] == pytest.approx(1.0, rel=0.05)


def test_slow_work_leaves_the_fast_its_trials() -> None:
    machine = Machine()
    fast, slow = timed(machine, machine.work(1e6, 0.9), machine.work(5e9, 0.5))
    assert slow["trials"] == LEAST_TRIALS
    assert fast["trials"] > 3 * LEAST_TRIALS


def test_shapes_are_those_of_the_models() -> None:
    assert {(m.n, m.k) for m in LAYERS["deepseek-v3"].matrices} == {(2048, 7168), (7168, 2048)}
    assert {(m.n, m.k) for m in LAYERS["qwen3-235b-a22b"].matrices} == {(1536, 4096), (4096, 1536)}
    assert set(PRESETS) <= set(LAYERS)
    every = layers_of(None)
    assert len({(m.n, m.k) for m in matrices_of(every)}) == len(matrices_of(every)) == 8
    assert [one.model for one in distinct_layers(every)] == ["deepseek-v3", "qwen3-235b-a22b", "qwen3-30b-a3b", "tiny"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shapes": ["deepseek"]}, "unknown model 'deepseek'"),
        ({"shapes": []}, "shapes: expected some of"),
        ({"rows": [0]}, "rows: expected integers from 1"),
        ({"rows": []}, "rows: expected at least one"),
        ({"rows": [True]}, "rows: expected integers"),
        ({"threads": [4096]}, "threads: expected integers from 1 to 1024"),
        ({"seconds": 0}, "seconds: expected a number above 0"),
        ({"seconds": float("nan")}, "seconds: expected a number above 0"),
        ({"peers": ["tensorrt"]}, "peers: unknown 'tensorrt'"),
    ],
)
def test_mistakes_are_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as found:
        bench_kernels.run(**arguments, quick=True)
    assert "\n" not in str(found.value)


def test_a_missing_peer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "find_spec", lambda name: None if name == "ggml" else object())
    there, notes = bench_peers.find_peers(None)
    assert there == ("torch_bf16", "torch_fp8", "kt_kernel")
    assert notes == ["ggml is not installed: no rows of it (docs/peers.md)"]


def test_torch_gets_its_threads_back() -> None:
    import torch

    before = torch.get_num_threads()
    with pytest.raises(KeyError), bench_peers.torch_threads(before + 1, ["torch_bf16"]):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_steps_take_all_experts_before_one_comes_again() -> None:
    steps = routings(1, 32, 8)
    assert sorted(np.concatenate([ids.ravel() for ids, _ in steps])) == list(range(32))
    assert experts_used(steps) == 8
    ((ids, weights),) = routings(100, 16, 4)
    assert ids.shape == weights.shape == (100, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())


@compiled
def test_layer_peers_do_the_work_that_ours_does() -> None:
    layer = LayerShape("wide", 256, 128, 128, 4)
    pool = WeightPool(1 << 20)
    assert pool.count(layer.expert_bytes(2)) < PREFILL_EXPERTS  # so that experts are repeated
    x = np.ones((32, layer.hidden), np.float32)
    ours = OurLayer(layer, pool, PREFILL_EXPERTS, weights="bf16", layout="rows", tier=kernels.tier())
    (peer,) = layer_peers(["torch_bf16"], layer, pool, PREFILL_EXPERTS, 1)
    (call,), (peers_call,) = ours.calls(x, 1), peer.calls(x, 1)
    _, ids, slots, _ = call.args  # type: ignore[attr-defined]
    _, peers_ids, peers_slots = peers_call.args  # type: ignore[attr-defined]
    np.testing.assert_array_equal(peers_ids.numpy(), ids)
    np.testing.assert_array_equal(peers_slots.numpy(), slots)
    assert peer.weight_bytes == ours.weight_bytes
    assert peers_call().shape == x.shape  # type: ignore[attr-defined]


def test_weights_are_spread_and_never_nan() -> None:
    pool = WeightPool(1 << 20)
    codes, scale = pool.fp8(256, 384)
    assert scale.shape == (2, 3) and (scale > 0).all()
    assert not np.isin(codes, FP8_NAN_CODES).any()
    assert len(np.unique(codes)) > 90
    again = [pool.fp8(256, 384)[0] for _ in range(pool.count(codes.nbytes))]
    assert all(one.__array_interface__["data"][0] % 64 == 0 for one in again)
    assert len({one.__array_interface__["data"][0] for one in [codes, *again]}) == 10  # then the buffer starts again


def points(**columns: Any) -> Iterator[dict[str, Any]]:
    """Rows of a table as far as targets look at it; fractions by formula."""
    base: dict[str, Any] = {"work": "matrix", "model": "tiny", "matrix": "gate_up", "n": 128, "k": 256}
    base |= {"contender": "hybridlab", "weights": "fp8", "slow_tier": False, "place": "memory", "evidence": "measured"}
    for threads in (1, 2):
        for layout, extra in (("tiles", 0.0), ("rows", -0.1)):
            row = base | {"threads": threads, "layout": layout, "rows": 1, "tier": "best", "call_s": 1.0 / threads}
            numbers = {"read_fraction": 0.9 + extra, "multiply_fraction": 0.5, "times_slower": 1.0}
            row |= numbers | columns
            spread = {f"{name}_q{q}": row[name] * (0.9 + 0.05 * q) for name in (*numbers, "call_s") for q in (1, 3)}
            yield row | spread


def test_targets_take_the_best_layout_and_the_worst_m() -> None:
    rows = [*points(), *points(rows=16, multiply_fraction=0.8), *points(rows=64, multiply_fraction=0.7)]
    table = targets_table(pd.DataFrame(rows)).set_index("target")
    gemv = table.loc["GEMV / read, 1 thread"]
    assert gemv["measured"] == pytest.approx(0.9) and gemv["point"].endswith("1 thread, best, tiles")
    assert gemv["must"] == 0.92 and gemv["aim"] == 0.97
    batch = table.loc["M = 16 to 64 / multiply, all threads"]
    assert batch["measured"] == pytest.approx(0.7) and "M = 64, 2 threads" in batch["point"]
    assert np.isnan(table.loc["AVX2 / read, 1 thread", "measured"])
    assert "not measured" in shown(table.reset_index())


def test_the_target_of_tiers_is_the_slower_tier() -> None:
    rows = [
        *points(),
        *points(slow_tier=True, tier="avx512_bf16", read_fraction=0.7),
        *points(slow_tier=True, tier="avx512_bw", read_fraction=0.55),
    ]
    table = targets_table(pd.DataFrame(rows)).set_index("target")
    assert table.loc["AVX-512 without VBMI / read, 1 thread", "measured"] == pytest.approx(0.55)


def test_kt_kernel_is_compared_at_its_best_thread_count() -> None:
    step = {"work": "moe_step"}
    rival = [one | {"call_s": 2.0 + one["threads"]} for one in points(**step, contender="kt_kernel")]
    table = targets_table(pd.DataFrame([*points(**step), *rival])).set_index("target")
    assert table.loc["kt-kernel FP8, MoE step, its best threads", "measured"] == pytest.approx(3.0 / 0.5)


def test_targets_of_an_empty_table_are_not_measured() -> None:
    table: Any = targets_table(pd.DataFrame())
    assert len(table) == 12 and table["measured"].isna().all()


@compiled
def test_the_plan_covers_what_is_asked_for() -> None:
    settings = Settings(layers_of(["tiny"]), (1, 4096), (1, 2), 0.1)
    found = sections(settings, ["torch_bf16"], WeightPool(1 << 20))
    names = [one.label for one in found]
    assert names[:2] == ["tiny 128x256", "tiny 256x128"]
    assert names[-2:] == ["tiny moe_step", "tiny moe_prefill"]
    assert {f"tiny 128x256 {tier}" for tier in kernels.supported_tiers()[1:]} <= set(names)
    places = [(point.rows, point.threads, point.place) for point in found[0].points]
    assert (4096, 2, "memory") in places and (1, 1, "l3") in places and (4096, 1, "l3") not in places


@compiled
def test_a_quick_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The real machine, on small buffers; times are not looked at."""
    monkeypatch.setattr(bench_kernels, "out_of_cache_bytes", lambda: 4 << 20)
    bench = bench_kernels.run(["tiny"], rows=[1, 16], threads=[1], seconds=0.001, peers=["torch_bf16"], progress=False)
    table: Any = bench.table
    assert bench.complete and capfd.readouterr().out == ""
    assert set(table["evidence"]) == {"measured"} and set(table["threads"]) == {1}
    assert {"hybridlab", "torch_bf16"} == set(table["contender"])
    assert {"matrix", "moe_step"} == set(table["work"])
    ours = table[(table["contender"] == "hybridlab") & (table["weights"] == "fp8") & (table["work"] == "matrix")]
    assert (ours[ours["layout"] == "tiles"]["layout_bytes"] == 128 * 256).all()
    assert (ours[ours["layout"] == "rows"]["layout_bytes"] == 0).all()
    assert (ours["weight_bytes"] == 128 * 256 + 4 * 2).all()
    measured = ["call_s", "weights_gb_s", "gflop_s", "read_gb_s", "multiply_gflop_s", "read_fraction"]
    assert (table[measured] > 0).all(axis=None)
    assert (table["call_s_q1"] <= table["call_s"]).all() and (table["call_s"] <= table["call_s_q3"]).all()
    assert bench.as_dict()["machine"]["cpu"] in str(bench) and "GEMV / read" in bench._repr_html_()


@compiled
def test_an_interrupt_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "out_of_cache_bytes", lambda: 4 << 20)
    calls = iter(range(2))

    def interrupted(*arguments: Any, **extra: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return time_together(*arguments, **extra)

    monkeypatch.setattr(bench_kernels, "time_together", interrupted)
    bench = bench_kernels.run(["tiny"], rows=[1, 2, 4], threads=[1], seconds=0.001, peers=(), progress=False)
    assert not bench.complete
    assert len(bench.table) and bench.notes == (f"interrupted after {len(bench.table)} points",)
