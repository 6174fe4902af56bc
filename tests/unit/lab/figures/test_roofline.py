"""The roofline, the rate of weights, the table of FP8 codes, and the files of `bench kernels --out`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybridlab.bench import kernels as bench_kernels
from hybridlab.bench.kernels import KernelBench
from hybridlab.cli.app import app
from hybridlab.errors import ConfigError
from hybridlab.figures import fp8_codes, fp8_table, roofline, save, weights_rate
from hybridlab.figures.kernel_bench import read_kernel_bench, save_kernel_bench
from hybridlab.figures.publish import rebuild

READ, PEAK = 40.0, 240.0
WAYS = {("hybridlab", "fp8", "tiles"): 0.95, ("hybridlab", "fp8", "rows"): 0.9, ("torch_bf16", "bf16", "rows"): 0.5}


def make_table(rows: tuple[int, ...] = (1, 4, 16, 64), **columns: Any) -> pd.DataFrame:
    """Rates are a share of the roof, by formula; no number here was measured."""
    found = []
    for (contender, weights, layout), share in WAYS.items():
        for threads in (1, 2):
            for m in rows:
                intensity = 2 * m / (1 if weights == "fp8" else 2)
                gflop_s = share * min(READ * intensity, PEAK * threads)
                row = {"work": "matrix", "model": "tiny", "matrix": "gate_up", "n": 128, "k": 256}
                row |= {"contender": contender, "tier": "best", "slow_tier": False, "weights": weights}
                row |= {"layout": layout, "place": "memory", "threads": threads, "rows": m, "call_s": 1e-3}
                row |= {"flop_per_byte": intensity, "gflop_s": gflop_s, "weights_gb_s": gflop_s / intensity}
                row |= {"read_gb_s": READ, "multiply_gflop_s": PEAK * threads}
                for name in ("read_fraction", "multiply_fraction", "times_slower", "call_s"):
                    row |= {one: row.get(name, share) for one in (name, f"{name}_q1", f"{name}_q3")}
                row |= {"evidence": "measured", "machine": "test CPU, 2 cores", "code": "c0ffee"}
                found.append(row | columns)
    return pd.DataFrame(found)


def make_bench(table: pd.DataFrame | None = None, **changes: Any) -> KernelBench:
    machine = {"cpu": "test CPU", "cores": 2, "isa": "best"}
    versions = {"hybridlab": "0.1.0"}
    return KernelBench(make_table() if table is None else table, machine, versions, {"commit": "c0ffee"}, **changes)


def lines_of(ax: Any) -> list[Any]:
    """Lines with markers: the points."""
    return [line for line in ax.get_lines() if line.get_marker() not in ("None", "", None)]


def test_points_lie_under_the_roof_of_the_most_threads(legend_texts: Callable[[Any], list[str]]) -> None:
    ax = roofline(make_table())
    ours, rows, torch = lines_of(ax)
    assert list(ours.get_xdata()) == [2, 8, 32, 128]
    assert list(ours.get_ydata()) == pytest.approx([0.95 * min(READ * x, 2 * PEAK) for x in (2, 8, 32, 128)])
    assert list(torch.get_xdata()) == [1, 4, 16, 64]
    assert rows.get_linestyle() == "-" and torch.get_linestyle() == "None"
    roofs: list[Any] = [line for line in ax.get_lines() if line not in (ours, rows, torch)]
    assert [max(line.get_ydata()) for line in roofs] == [PEAK, 2 * PEAK]
    assert [line.get_xdata()[1] for line in roofs] == [PEAK / READ, 2 * PEAK / READ]
    texts = legend_texts(ax)
    assert texts == ["FP8, tiles", "FP8, rows", "torch BF16", "measured", "measured ceilings"]
    assert "1 thread: 40 GB/s, 240 GFLOP/s" in [text.get_text() for text in ax.texts]


def test_crossover_is_where_the_ceilings_meet() -> None:
    ax = weights_rate(make_bench())
    assert f"M = {2 * PEAK / (2 * READ):.1f}" in " ".join(text.get_text() for text in ax.texts)
    assert list(lines_of(ax)[0].get_ydata()) == pytest.approx([38, 38, 0.95 * 15, 0.95 * 3.75])
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_no_crossover_is_drawn_where_none_was_measured() -> None:
    assert not any("arithmetic" in text.get_text() for text in weights_rate(make_table(rows=(1, 2))).texts)


def test_published_peers_are_drawn_only_if_asked_for() -> None:
    table = make_table()
    published = table[table["contender"] == "torch_bf16"].assign(contender="kt_kernel", evidence="published")
    both = pd.concat([table, published], ignore_index=True)
    with pytest.raises(ConfigError, match="evidence="):
        roofline(both)
    ax = roofline(both, evidence=["measured", "published"])
    assert lines_of(ax)[-1].get_markersize() < lines_of(ax)[0].get_markersize()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "llama"}, "no row with model = 'llama'"),
        ({"where": {"layouts": "rows"}}, "no column 'layouts'"),
        ({"ax": 3}, "ax: expected Axes"),
    ],
)
@pytest.mark.parametrize("figure", [roofline, weights_rate])
def test_mistakes_are_one_line(figure: Callable[..., Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        figure(make_table(), **arguments)
    with pytest.raises(ConfigError, match="no column 'gflop_s'"):
        figure(make_table().drop(columns="gflop_s"))


def test_fp8_table_gives_the_bytes_of_bf16() -> None:
    table = fp8_table()
    assert list(table["kind"].value_counts()[["normal", "subnormal", "zero", "NaN"]]) == [119, 7, 1, 1]
    words = (table["high"].to_numpy(np.uint32) << 8 | table["low"].to_numpy(np.uint32)) << 16
    values = words.astype(np.uint32).view(np.float32)
    assert np.array_equal(values, table["value"].to_numpy(np.float32), equal_nan=True)
    assert values[1] == 2.0**-9 and values[126] == 448


def test_fp8_codes_draws_every_code_once() -> None:
    drawn = [line for line in fp8_codes().get_lines() if line.get_label() in ("normal", "zero and subnormal")]
    codes = np.concatenate([line.get_xdata() for line in drawn])
    assert sorted(codes) == list(range(256))
    assert sum(np.isfinite(line.get_ydata()).sum() for line in drawn) == 254


def test_files_are_written_and_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "FORMATS", (".svg",))
    folder = tmp_path / "paper" / "kernels"
    written = save_kernel_bench(make_bench(), folder, "hybridlab bench kernels --out DIR")
    names = {"kernels.csv", "targets.csv", "meta.json", "roofline.svg", "weights_rate.svg"}
    assert names <= {path.name for path in written} == {path.name for path in folder.iterdir()}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["command"].startswith("hybridlab bench") and meta["machine"]["cpu"] == "test CPU"
    assert read_kernel_bench(folder)["gflop_s"].tolist() == pytest.approx(make_table()["gflop_s"].tolist(), rel=1e-5)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "roofline.svg").unlink()
    rebuild(["kernels"], tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "kernels.csv").write_text("work\nmatrix\n")
    with pytest.raises(ConfigError, match=r"kernels.csv: damaged \(no column"):
        rebuild(["kernels"], tmp_path)


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, ["bench", "kernels", *map(str, words)])


def test_command_writes_files_and_prints_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "FORMATS", (".svg",))
    asked: list[Any] = []

    def run(*arguments: Any, **extra: Any) -> KernelBench:
        asked.append((arguments, extra))
        return make_bench()

    monkeypatch.setattr(bench_kernels, "run", run)
    done = invoke("--quick", "--shape", "tiny", "--rows", "1,16", "--threads", "1", "--out", tmp_path / "o")
    assert done.exit_code == 0 and "GEMV / read, 1 thread" in done.stdout
    assert asked == [
        ((["tiny"],), {"rows": [1, 16], "threads": [1], "seconds": None, "peers": None, "quick": True}),
    ]
    meta = json.loads((tmp_path / "o" / "meta.json").read_text())
    assert meta["command"] == "hybridlab bench kernels --quick --shape tiny --rows 1,16 --threads 1 --out DIR"
    assert json.loads(invoke("--json", "--peers", "none").stdout)["table"][0]["model"] == "tiny"
    assert asked[-1][1]["peers"] == ()


def test_interrupted_command_prints_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(complete=False, notes=("interrupted after 24 points",))
    monkeypatch.setattr(bench_kernels, "run", lambda *_, **__: bench)
    done = invoke()
    assert done.exit_code == 130 and "interrupted after 24 points" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", "1,x"), "--rows: expected numbers such as 1,2,4, got 'x'"),
        (("--threads", ""), "--threads: expected numbers such as 1,2,4, got ''"),
        (("--rows", "0"), "rows: expected integers from 1"),
        (("--shape", "gpt"), "unknown model 'gpt'"),
        (("--seconds", "-1"), "seconds: expected a number above 0"),
        (("--peers", "torch"), "peers: unknown 'torch'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(words: tuple[str, ...], message: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
