"""The `figures:` key of a config, and how it is carried out."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import pytest

from hybridlab import columns, figures_config
from hybridlab.config import load_config, points
from hybridlab.errors import ConfigError
from hybridlab.figures import draw_figures, save
from hybridlab.figures.draw import FUNCTIONS
from hybridlab.figures.marks import EVIDENCE_MARKS
from hybridlab.figures_config import FIGURES, FigureConfig, read_figures
from hybridlab.metrics import summarise
from hybridlab.request import Request, RequestRecord, Status
from hybridlab.stored_run import SPAN_COLUMNS

BASE = {
    "experiment": "q",
    "model": {"preset": "tiny"},
    "workload": {"kind": "poisson", "num_requests": 3, "rate_req_s": 1.0, "prompt_tokens": 4, "output_tokens": 4},
    "sweep": {"workload.rate_req_s": [2.0, 3.0]},
}


def load(figures: Any) -> Any:
    return load_config({**BASE, "figures": figures})


def test_figures_are_names_or_mappings() -> None:
    config = load(
        [
            "load_curves",
            {
                "figure": "latency_cdf",
                "name": "gaps",
                "width": "two_columns",
                "metric": "itl_s",
                "where": {"workload.rate_req_s": 2.0, "scheduler": ["fcfs"]},
                "by": "scheduler",
                "evidence": ["measured", "simulated"],
                "slo": "paper",
            },
        ]
    )
    first, second = config.figures
    assert (first.stem, first.arguments(), second.stem, second.width) == ("load_curves", {}, "gaps", "two_columns")
    told = second.arguments()
    assert told["where"] == {"workload.rate_req_s": 2.0, "scheduler": ["fcfs"]}
    assert (told["by"], told["evidence"], told["slo"].name) == (("scheduler",), ("measured", "simulated"), "paper")
    assert {len(point.config.figures) for point in points(config)} == {2}  # points carry them along
    assert [figure.stem for figure in load_config(BASE).figures] == ["ttft_throughput"]
    assert load([]).figures == ()


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ("ttft_throughput", "expected a list of figures, got 'ttft_throughput'"),
        (["ttft_thruput"], "entry 1: unknown figure 'ttft_thruput'; did you mean 'ttft_throughput'?"),
        (["timeline", 3], "entry 2: expected a figure's name or a mapping with 'figure', got 3"),
        ([{"name": "x"}], "entry 1: expected a figure's name or a mapping with 'figure'"),
        ([{"figure": "latency_cdf", "metrik": 1}], "(latency_cdf): unknown key 'metrik'; did you mean 'metric'?"),
        ([{"figure": "latency_cdf", "metric": "ttft"}], "(latency_cdf): metric: expected 'ttft_s', 'tpot_s', "),
        ([{"figure": "ttft_throughput", "ttft": "p95"}], "ttft: expected 'median', 'p90' or 'p99', got 'p95'"),
        ([{"figure": "load_curves", "evidence": "measurd"}], "evidence.0: expected 'measured', "),
        ([{"figure": "load_curves", "slo": "papper"}], "slo: unknown preset 'papper'; did you mean 'paper'?"),
        ([{"figure": "load_curves", "slo": {"ttft_s": 1.0}}], "slo.tpot_s: missing"),
        ([{"figure": "load_curves", "width": "wide"}], "width: expected 'one_column' or 'two_columns', got 'wide'"),
        ([{"figure": "load_curves", "name": "../x"}], "name: expected a file name of letters"),
        ([{"figure": "load_curves", "name": "meta"}], "name: expected a file name of letters"),
        ([{"figure": "load_curves", "where": {"a": {}}}], "where: a: expected a value or a list of values, got {}"),
        (["timeline", "timeline"], "entry 2: a second figure 'timeline'; give it a name of its own"),
        ([{"figure": "timeline", "name": "A"}, {"figure": "timeline", "name": "a"}], "entry 2: a second figure 'a'"),
    ],
)
def test_bad_entries_are_named_when_the_config_is_loaded(figures: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(figures)
    text = str(caught.value)
    assert text.startswith("config: figures: ") and message in text and "\n" not in text


def test_every_entry_is_a_function_with_these_arguments() -> None:
    assert list(FIGURES) == list(FUNCTIONS)
    for name, kind in FIGURES.items():
        parameters = inspect.signature(FUNCTIONS[name]).parameters
        own = set(kind.model_fields) - {"figure", "name", "width"}
        assert own == set(list(parameters)[2:]) - {"width_in"}, name
        for argument in own:
            assert kind.model_fields[argument].default == parameters[argument].default or argument == "by", argument
    assert tuple(EVIDENCE_MARKS) == columns.EVIDENCE


def test_known_columns_are_those_of_the_tables() -> None:
    record = RequestRecord(Request("r", (1,), 1), Status.FINISHED)
    numbers = {name for name, value in summarise([record], 1.0).items() if not isinstance(value, str | bool)}
    assert {*numbers, "num_steps"} == {*columns.OF_A_SUMMARY, "slo_ttft_s", "slo_tpot_s"}
    assert set(SPAN_COLUMNS) == set(figures_config.SPAN_COLUMNS)
    assert {kind.table for kind in FIGURES.values()} == set(figures_config.OWN_COLUMNS)


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (
            {"figure": "latency_cdf", "where": {"nope": 1}},
            "entry 2 (latency_cdf): where: no column 'nope'; ",
        ),
        (
            {"figure": "ttft_throughput", "where": {"workload.rate_reqs": 1}},
            "entry 2 (ttft_throughput): where: no column 'workload.rate_reqs'; did you mean 'workload.rate_req_s'?",
        ),
        ({"figure": "load_curves", "by": "shceduler"}, "by: no column 'shceduler'; did you mean 'scheduler'?"),
        ({"figure": "load_curves", "by": ["scheduler", "engine.threads"]}, "by: no column 'engine.threads'"),
        ({"figure": "load_curves", "where": {"lane": "x"}}, "where: no column 'lane'"),  # of another table
        (
            {"figure": "load_curves", "load": "scheduler"},
            "load: no number 'scheduler'; expected one of ",
        ),
        ({"figure": "load_curves", "by": []}, "by: expected a name or a list of names, got an empty list"),
    ],
)
def test_columns_that_can_be_none_are_named_when_the_config_is_loaded(figure: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["timeline", figure])
    text = str(caught.value)
    assert text.startswith("config: figures: entry 2 (") and message in text and "\n" not in text


def test_columns_of_every_kind_are_taken() -> None:
    one = {"workload.rate_req_s": 2.0}
    load(
        [
            {
                "figure": "ttft_throughput",
                "load": "workload.rate_req_s",
                "by": ["machine", "code"],
                "where": {"repeat": 0},
            },
            {"figure": "load_curves", "load": "request_throughput_req_s", "by": "placement", "where": {"completed": 3}},
            {"figure": "latency_cdf", "by": "finish_reason", "where": {**one, "prompt_tokens": 4}},
            {"figure": "timeline", "where": {**one, "run_id": "0123", "lane": "main/cpu"}},
        ]
    )
    blocks = {"zip": {"engine.threads": [1, 2]}, "list": [{"model.seed": 0}, {"workload.seed": 1}]}
    by = {"figure": "load_curves", "by": ["engine.threads", "model.seed", "workload.seed"]}
    config = load_config({**BASE, "sweep": blocks, "figures": [by]})
    assert len(points(config)) == 4  # points have no sweep, and keep the figures
    by = [{"figure": "load_curves", "by": "scheduler.chunk_tokens"}]
    sweep = {"scheduler.chunk_tokens": [8, 9]}
    config = load_config({**BASE, "scheduler": "chunked_prefill", "sweep": sweep, "figures": by})
    assert config.replaced({"scheduler": "fcfs"}).figures  # what cannot be drawn then is said when it is drawn


def test_loading_a_config_imports_no_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "figures": ["timeline"]}))
    source = "import json, sys; from hybridlab.config import load_config; load_config(json.load(open(sys.argv[1])))"
    check = "; assert not {'matplotlib', 'pandas', 'hybridlab.figures'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", source + check, str(tmp_path / "config.json")], check=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "FORMATS", (".svg",))  # the others take longer


def draw(tables: Any, figures: Any, folder: Path) -> list[Path]:
    config: Any = SimpleNamespace(figures=read_figures(figures))
    return draw_figures(config, tables.summary, tables.requests, tables.spans, folder, "the command")


def test_figures_are_drawn_as_the_config_says(quick: None, tables: Any, tmp_path: Path) -> None:
    one = {"workload.rate_scale": 1.0}
    figures = [
        {"figure": "ttft_throughput", "ttft": "p90", "width": "two_columns"},
        "load_curves",
        {"figure": "ttft_prompt_length", "where": one, "name": "lengths"},
        {"figure": "latency_cdf", "where": one, "metric": "itl_s"},
        {"figure": "timeline", "where": {**one, "scheduler": "fcfs", "repeat": 0}},
    ]
    written = draw(tables(), figures, tmp_path / "new")
    stems = ["ttft_throughput", "load_curves", "lengths", "latency_cdf", "timeline"]
    assert [path.name for path in written] == [f"{stem}{end}" for stem in stems for end in (".svg", ".json")]
    assert set(written) == set((tmp_path / "new").iterdir())
    assert "p90 TTFT (s)" in (tmp_path / "new" / "ttft_throughput.svg").read_text()
    told = json.loads((tmp_path / "new" / "timeline.json").read_text())
    assert (told["run_ids"], told["command"]) == (["fcfs-1-0"], "the command")
    assert plt.get_fignums() == []  # nothing stays open


def test_a_figure_that_cannot_be_drawn_stops_no_other(quick: None, tables: Any, tmp_path: Path) -> None:
    figures = [{"figure": "latency_cdf", "name": "cdf"}, "timeline", "load_curves"]
    with pytest.raises(ConfigError, match=r"^figures: cdf: latency_cdf: requests of 'fcfs' .* \(and 1 more figures\)$"):
        draw(tables(), figures, tmp_path)
    assert len(list(tmp_path.glob("load_curves.*"))) == 2 == len(list(tmp_path.iterdir()))
    assert plt.get_fignums() == []


def test_entries_are_frozen_and_pass_unchanged() -> None:
    (entry,) = read_figures(["timeline"])
    assert read_figures([entry]) == (entry,) and isinstance(entry, FigureConfig)
    assert load([entry]).model_dump()["figures"][0]["start_s"] is None  # a subclass is dumped whole
