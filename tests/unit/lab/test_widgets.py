"""The panel is driven as a browser would: by setting `.value` and clicking, without a front end."""

from __future__ import annotations

import base64
import io
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from PIL import Image

import hybridlab as hl
from hybridlab.errors import ConfigError
from hybridlab.experiment import ExperimentResult
from hybridlab.figures import ttft_throughput
from hybridlab.metrics import SLO
from hybridlab.widgets import drawing, explore
from hybridlab.widgets.controls import Controls
from hybridlab.widgets.drawing import VIEWS, View
from hybridlab.widgets.summary_rows import label
from hybridlab.widgets.table import open_results

FCFS, CHUNKED = "fcfs", "chunked_prefill(chunk_tokens=8)"


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """The result of the first test that asks for `swept`, and the folder of its store, which the others copy."""
    return {}


@pytest.fixture
def swept(bench: Any, config: dict[str, Any], made: dict[str, Any], tmp_path: Path) -> ExperimentResult:
    """Two schedulers at two loads, twice each, in the store of an empty project; prompts of 2 to 900 tokens."""
    if made:
        shutil.copytree(made["store"], tmp_path / "results")
        return made["result"]
    workload = {"kind": "poisson", "rate_req_s": 2.0, "num_requests": 12, "prompt_tokens": [2, 900], "output_tokens": 5}
    schedulers = ["fcfs", {"name": "chunked_prefill", "chunk_tokens": 8}]
    sweep = {"scheduler": schedulers, "workload.rate_req_s": [2.0, 8.0]}
    changes = {"workload": workload, "repeats": 2, "slo": "paper", "sweep": sweep}
    made |= {"result": hl.run(config | changes, progress=False), "store": tmp_path / "results"}
    return made["result"]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_first_state_shows_everything(swept: Any) -> None:
    panel = hl.explore("question")
    named = panel.controls.named
    assert named["figure"].value == "ttft_throughput" and named["by"].value == "scheduler"
    assert panel.message == "8 of 8 runs"
    assert list(panel.controls.filters) == ["scheduler", "workload.rate_req_s"]
    assert panel.controls.filters["scheduler"].options == (FCFS, CHUNKED)
    assert panel.controls.filters["workload.rate_req_s"].options == ("2", "8")
    picture = pixels(panel.png)
    assert picture.shape[1] == 708 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert named["x"].layout.display == "none" and named["percentile"].layout.display is None
    assert plt.get_fignums() == []


@pytest.mark.parametrize("figure", VIEWS)
def test_every_figure_draws_and_heeds_its_controls(swept: Any, figure: str) -> None:
    panel = explore(swept, figure=figure)
    assert panel.png and " of 8 runs" in panel.message
    options = {"by": "workload.rate_req_s", "percentile": "p99", "metric": "e2el_s", "band": False}
    options |= {"x": "offered_req_s", "y": "p99_itl_s"}
    for name, value in options.items():
        before = panel.png
        panel.controls.named[name].value = value
        assert panel.message.endswith("of 8 runs"), name
        heeded = name in VIEWS[figure].controls
        assert heeded == (panel.png != before), name
        assert (panel.controls.named[name].layout.display != "none") == heeded


def test_figures_of_requests_start_with_one_load(swept: Any) -> None:
    panel = explore(swept)
    load = panel.controls.filters["workload.rate_req_s"]
    panel.controls.named["figure"].value = "latency_cdf"
    assert load.value == ("8",) and panel.message == "4 of 8 runs"
    panel.controls.named["figure"].value = "load_curves"
    assert load.value == ("2", "8") and panel.message == "8 of 8 runs"
    load.value = ("8",)
    panel.controls.named["figure"].value = "ttft_throughput"
    assert load.value == ("8",)  # by hand, so it stays
    panel.controls.named["figure"].value = "ttft_prompt_length"
    load.value = ("2", "8")  # asked for: every load is a line of its own
    assert panel.message == "8 of 8 runs"
    rows = panel.table.rows(panel.controls.choice, per_request=True)
    assert rows.by == ["scheduler", "workload.rate_req_s"]


def test_filters_choose_runs_and_keep_colours(swept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = explore(swept, figure="metrics_xy")
    drawn: list[Any] = []
    monkeypatch.setattr(drawing, "_legend_below", lambda figure: drawn.append(figure.axes[0].get_lines()) or 0.0)
    panel.controls.filters["workload.rate_req_s"].value = ("8",)
    both = drawn[-1]
    panel.controls.filters["scheduler"].value = (CHUNKED,)
    (only,) = drawn[-1]
    assert panel.message == "2 of 8 runs"
    assert only.get_color() == both[1].get_color() != both[0].get_color()
    rows = swept.summary.query(f"scheduler == '{CHUNKED}' and `workload.rate_req_s` == 8")
    assert list(only.get_xdata()) == pytest.approx([rows["output_tokens_per_s"].mean()])
    assert list(only.get_ydata()) == pytest.approx([rows["median_ttft_s"].mean()])


def test_empty_selection_says_so_and_the_next_change_works(swept: Any) -> None:
    panel = explore(swept)
    before, scheduler = panel.png, panel.controls.filters["scheduler"]
    scheduler.value = ()
    assert panel.message == "no run selected: choose at least one value of scheduler"
    assert panel.png == before
    scheduler.value = (FCFS,)
    assert panel.message == "4 of 8 runs" and panel.png != before


def test_a_failing_callback_is_one_line(
    swept: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("<b>division</b>\nby zero")

    panel = explore(swept)
    before = panel.png
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(drawing, "VIEWS", {name: View("broken", broken, {}) for name in VIEWS})
        panel.controls.named["percentile"].value = "p99"
    assert panel.message == "ZeroDivisionError: <b>division</b> by zero"
    shown = panel.line.value
    assert "&lt;b&gt;" in shown and "last one that could be drawn" in shown and "\n" not in shown
    assert panel.png == before
    assert capfd.readouterr() == ("", "") and caplog.records == []
    panel.controls.named["percentile"].value = "p90"
    assert panel.message == "8 of 8 runs" and panel.png != before


def test_warnings_are_words_in_the_panel(
    swept: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import warnings

    def warned(*args: Any, **kwargs: Any) -> Any:
        warnings.warn("thin ice", stacklevel=1)
        return ttft_throughput(args[0], args[1], by=kwargs["by"])

    panel = explore(swept)
    monkeypatch.setattr(drawing, "VIEWS", {"ttft_throughput": View("warned", warned, {})})
    panel.controls.named["band"].value = False
    assert panel.message == "8 of 8 runs; thin ice" and capfd.readouterr().err == ""


def test_preset_and_limits_of_the_slo_stay_in_step(swept: Any) -> None:
    panel = explore(swept)
    named, drawn = panel.controls.named, []
    assert (named["slo"].value, named["ttft_s"].value, named["tpot_ms"].value) == ("as stored", 30.0, 50.0)
    panel.image.observe(drawn.append, names="value")
    named["slo"].value = "mlperf-r1-interactive"
    assert (named["ttft_s"].value, named["tpot_ms"].value) == (1.5, 15.0)
    named["tpot_ms"].value = 7
    assert named["slo"].value == "custom" and len(drawn) == 2  # one picture for each change by hand
    slo = panel.controls.choice.slo
    assert slo is not None and (slo.name, slo.ttft_s, slo.tpot_s) == ("custom", 1.5, 0.007)
    named["slo"].value = "as stored"
    assert named["ttft_s"].value == 30.0 and panel.controls.choice.slo is None


@pytest.mark.parametrize("source", ["question", "result"])
def test_goodput_is_recomputed_from_the_requests(swept: Any, source: str) -> None:
    panel = explore("question" if source == "question" else swept, figure="metrics_xy", y="request_goodput_req_s")
    named = panel.controls.named
    named["ttft_s"].value, named["tpot_ms"].value = 1.0, 11
    rows = panel.table.rows(panel.controls.choice, per_request=False).summary
    expected = hl.results("question", slo=SLO(ttft_s=1.0, tpot_s=0.011))
    merged = rows.merge(expected, on="run_id", suffixes=("", "_expected"))
    assert len(merged) == 8 and panel.message == "8 of 8 runs"
    assert merged["request_goodput_req_s"].tolist() == pytest.approx(merged["request_goodput_req_s_expected"].tolist())
    assert (merged["request_goodput_req_s"] < swept.summary["request_goodput_req_s"].max()).any()
    named["tpot_ms"].value = 9  # the fake engine takes 10
    assert set(panel.table.rows(panel.controls.choice, per_request=False).summary["request_goodput_req_s"]) == {0.0}


def test_goodput_without_requests_is_not_shown_under_another_slo(swept: Any) -> None:
    panel = explore(swept.summary, figure="metrics_xy", y="request_goodput_req_s")
    assert panel.message == "8 of 8 runs"
    panel.controls.named["ttft_s"].value = 1.0
    assert panel.message.endswith("over output throughput (tokens/s): no rows to draw; none has both values")
    panel.controls.named["y"].value = "median_ttft_s"
    assert "goodput at another SLO needs the requests" in panel.message
    panel.controls.named["figure"].value = "latency_cdf"
    assert panel.message.startswith("latency CDF needs the requests")


@pytest.mark.parametrize("figure", ["load_curves", "latency_cdf", "metrics_xy"])
def test_saved_figure_names_its_runs_and_its_call(swept: Any, tmp_path: Path, figure: str) -> None:
    panel = explore("question", figure=figure, keep={"scheduler": "fcfs"}, slo="mlperf-r1-server", band=False)
    panel.file_name.value = "kept/mine.pdf"
    panel.save_button.click()
    assert panel.message == "saved kept/mine as json, pdf, png, svg"
    sidecar = json.loads((tmp_path / "kept/mine.json").read_text())
    fcfs = swept.summary.query("scheduler == 'fcfs'")
    one_load = VIEWS[figure].table == "requests"
    ids = fcfs.query("`workload.rate_req_s` == 8") if one_load else fcfs
    assert sorted(sidecar["run_ids"]) == sorted(ids["run_id"])
    assert sidecar["command"] == panel.code
    assert plt.get_fignums() == []
    again = eval(sidecar["command"], {"hl": hl})  # the command is a call that gives the same panel
    assert again.png == panel.png and again.code == panel.code


def test_save_that_fails_is_one_line(swept: Any, tmp_path: Path) -> None:
    panel = explore(swept)
    (tmp_path / "file").write_text("")
    panel.file_name.value = "file/mine"
    panel.save_button.click()
    assert "mine" in panel.message and "cannot be written" in panel.message
    panel.file_name.value = "  "
    panel.save_button.click()
    assert panel.message.startswith("file: expected a name")


def test_given_tables_are_never_changed_and_changing_them_changes_nothing(swept: Any) -> None:
    given = SimpleNamespace(summary=swept.summary.copy(), requests=swept.requests.copy())
    panel = explore(given)
    for figure in VIEWS:
        panel.controls.named["figure"].value = figure
        panel.controls.named["ttft_s"].value *= 1.5
    panel.controls.named["band"].value = False
    pd.testing.assert_frame_equal(given.summary, swept.summary)
    pd.testing.assert_frame_equal(given.requests, swept.requests)
    given.summary.loc[:, "median_ttft_s"] = 0.0
    given.requests.loc[:, "ttft_s"] = 0.0
    pd.testing.assert_frame_equal(panel.table.summary, swept.summary)
    pd.testing.assert_series_equal(panel.table.requests["ttft_s"], swept.requests["ttft_s"])  # pyright: ignore


def test_fallback_is_a_picture_and_a_line(swept: Any) -> None:
    panel = explore(swept)
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    fallback = base64.b64decode(bundle["image/png"])
    assert len(fallback) < len(panel.png) / 2
    difference = np.abs(pixels(fallback).astype(int) - pixels(panel.png))
    assert difference.mean() < 1 and difference.max() < 60
    assert bundle["text/plain"].startswith("Panel(question: TTFT over throughput, 8 of 8 runs)")


def test_newest_code_counts_and_kinds_are_compared_when_asked(swept: Any) -> None:
    old = swept.summary.assign(code="old", run_id="old-" + swept.summary["run_id"], median_ttft_s=9.0)
    simulated = swept.summary.assign(evidence="simulated", run_id="sim-" + swept.summary["run_id"])
    panel = explore(pd.concat([old, swept.summary, simulated]))
    assert panel.controls.filters["evidence"].value == ("measured",)
    assert panel.message == "8 of 24 runs; 8 older runs of the same points, by other code, are left out"
    panel.controls.filters["evidence"].value = ("measured", "simulated")
    assert "16 of 24 runs" in panel.message and "different evidence" in panel.message
    panel.controls.filters["code"].value = ("old",)
    assert panel.message == "8 of 24 runs"
    assert explore(pd.concat([old, swept.summary, simulated]), **panel.controls.settings()).message == panel.message


def test_too_many_lines_are_refused_in_the_panel(swept: Any) -> None:
    frame = pd.concat([swept.summary.assign(**{"engine.threads": n, "run_id": f"r{n}"}) for n in range(1, 14)])
    panel = explore(frame)
    assert panel.message == "26 lines (scheduler x engine.threads) are too many to read: select fewer runs below"
    assert panel.png == b"" and "image/png" not in panel._repr_mimebundle_()
    panel.controls.filters["engine.threads"].value = ("2", "10")
    assert panel.message == "16 of 104 runs" and panel.png


def test_axis_that_does_not_apply_has_a_label() -> None:
    rows = [{"scheduler": s, "scheduler.chunk_tokens": n, "a_s": 1.0, "b_s": 2.0} for s, n in (("x", None), ("y", 64))]
    table = open_results(pd.DataFrame(rows))
    assert list(table.values("scheduler.chunk_tokens")) == ["64", "none"]
    assert Controls(table).filters["scheduler.chunk_tokens"].options == ("64", "none")
    assert [label(value) for value in (None, float("nan"), 0.1, 1234567.0, True)] == [
        "none", "none", "0.1", "1234567", "True",
    ]  # fmt: skip


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"source": 3}, "explore: expected the name of an experiment, a result or its summary, got int"),
    ({"source": "nothing"}, "no such results"),
    ({"source": pd.DataFrame()}, "explore: no runs to show"),
    ({"source": pd.DataFrame({"scheduler": ["x"]})}, "at least two numeric columns"),
    ({"figure": "ttft_throughputs"}, "explore: figure: unknown 'ttft_throughputs'; did you mean"),
    ({"lines": "scheduler"}, "explore: unknown setting 'lines'"),
    ({"by": "schedule"}, "explore: by: 'schedule' is not to be had; expected one of scheduler, workload.rate_req_s"),
    ({"keep": {"workload.rate": 2}}, "explore: keep: no filter 'workload.rate'"),
    ({"keep": {"workload.rate_req_s": [2, 3]}}, "keep: workload.rate_req_s: .* expected one of 2, 8"),
    ({"keep": ["fcfs"]}, "explore: keep: expected a mapping"),
    ({"slo": "papers"}, "slo: unknown preset 'papers'"),
    ({"slo": {"ttft_s": -1, "tpot_s": 1}}, "slo: ttft_s"),
]


def test_bad_arguments_are_one_line(swept: Any) -> None:
    for given, message in BAD_ARGUMENTS:
        arguments = {"source": swept, **given}
        with pytest.raises(ConfigError, match=message) as caught:
            hl.explore(arguments.pop("source"), **arguments)
        assert "\n" not in str(caught.value)
