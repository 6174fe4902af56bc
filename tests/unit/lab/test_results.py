"""`hl.results`: what is in the table, what is said about it, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from reading_results import stored_as, told

from hybridlab.config import load_config
from hybridlab.errors import ConfigError
from hybridlab.experiment import run
from hybridlab.store import read_run, results
from hybridlab.summary_table import short_table


def test_kinds_of_evidence_are_mixed_only_on_request(stored: list[Path]) -> None:
    stored_as(stored[0], "aaaaaaaaaaaa", evidence="simulated")
    stored_as(stored[0], "bbbbbbbbbbbb", evidence="published")
    said, table = told()
    assert set(table["evidence"]) == {"measured"} and len(table) == 2
    left_out = "1 simulated run, 1 published run left out, only measured ones taken; evidence= asks for them"
    assert said == [f"question: {left_out}"]
    assert set(told(evidence=["measured", "simulated"])[1]["evidence"]) == {"measured", "simulated"}
    said, table = told(evidence="simulated")
    assert said == [] and table["run_id"].tolist() == ["aaaaaaaaaaaa"]
    with pytest.raises(ConfigError, match="evidence: unknown kind 'simulate'; did you mean 'simulated'"):
        results("question", evidence="simulate")


def test_a_table_that_mixes_code_or_machines_says_so_once(stored: list[Path]) -> None:
    assert told()[0] == []
    old = read_run(stored[0]).manifest
    code = {"commit": "f" * 40, "code_hash": "other"}
    stored_as(stored[0], "aaaaaaaaaaaa", identity={**old["identity"], "code": "other"}, code=code)
    stored_as(stored[0], "bbbbbbbbbbbb", machine={**old["machine"], "cpu": "Ryzen", "cores": 8})
    said, table = told()
    assert len(said) == 1 and len(table) == 4
    assert said[0].startswith("question: the table mixes 2 code versions (") and "ffffffffffff: 1 run" in said[0]
    assert "and 2 machines (test, 1 cores: 3 runs, Ryzen, 8 cores: 1 run); compare with care" in said[0]
    assert len(set(table["code"])) == 2


def test_a_commit_that_changes_no_measured_code_mixes_nothing(stored: list[Path]) -> None:
    code = {"commit": "f" * 40, "code_hash": read_run(stored[0]).manifest["code"]["code_hash"]}
    stored_as(stored[0], "aaaaaaaaaaaa", code=code)
    said, table = told()
    assert said == [] and len(set(table["code"])) == 2


def test_a_strategy_of_the_users_whose_code_changed_differs_in_code(
    bench: list[str], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "class Mine:\n    def schedule(self, queue):\n        return {}\n"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_strategy.py").write_text(source.format("None"))
    run({**config, "scheduler": "edited_strategy:Mine"}, progress=False)
    (tmp_path / "edited_strategy.py").write_text(source.format("queue.waiting and None"))
    monkeypatch.delitem(sys.modules, "edited_strategy")
    again = run({**config, "scheduler": "edited_strategy:Mine"}, progress=False)
    assert again.cached == ()
    said, table = told()
    assert table["scheduler"].tolist() == ["Mine", "Mine"] and len(set(table["code"])) == 2
    assert len(said) == 1 and "the table mixes 2 versions of scheduler Mine" in said[0]


def test_settings_that_a_point_leaves_alone_are_filled_in(bench: list[str], config: dict[str, Any]) -> None:
    sweep = {"list": [{"workload.num_requests": 1}, {"workload.num_requests": 2, "workload.seed": 7}]}
    result = run({**config, "sweep": sweep}, progress=False)
    for table in (result.summary, results("question")):
        assert table["workload.seed"].tolist() == [0, 7]
        assert table["workload.num_requests"].tolist() == [1, 2]


@pytest.mark.parametrize("name", ["../question", "question/..", "/etc", "", "question/192", ".hidden"])
def test_reading_never_leaves_the_store(stored: list[Path], name: str) -> None:
    with pytest.raises(ConfigError, match="no such results; experiments there: question"):
        results(name)


def test_lists_and_ranges_are_one_kind_of_cell(bench: list[str], config: dict[str, Any]) -> None:
    sweep = {"list": [{"workload.prompt_tokens": 16}, {"workload.output_tokens": 3}]}
    result = run({**config, "sweep": sweep}, progress=False)
    for table in (result.summary, result.table, short_table(results("question"))):
        assert table["workload.prompt_tokens"].tolist() == [16, "[2, 9]"]
        assert table["workload.output_tokens"].tolist() == [4, 3]
    ranges = {"workload.prompt_tokens": [(2, 9), [5, 5], [2, 8]]}
    swept = run({**config, "sweep": ranges}, progress=False).summary
    assert swept["workload.prompt_tokens"].tolist() == ["[2, 9]", 5, "[2, 8]"]


def test_a_config_edited_between_runs_makes_axes(bench: list[str], config: dict[str, Any]) -> None:
    workload = {**config["workload"], "num_requests": 2, "output_tokens": 12, "sampling": {"temperature": 0.5}}
    changed = {**config, "workload": workload, "engine": {"token_budget": 64}, "warmup_requests": 1}
    for one in (config, changed):
        run(one, progress=False)
    table = results("question")
    axes = [name for name in table.columns if "." in name or name == "warmup_requests"]
    assert sorted(axes) == [
        "engine.token_budget",
        "warmup_requests",
        "workload.num_requests",
        "workload.output_tokens",
        "workload.sampling.temperature",
    ]
    assert table["workload.output_tokens"].tolist() == [4, 12] and table["warmup_requests"].tolist() == [0, 1]
    assert set(axes) <= set(short_table(table).columns)


def test_what_a_label_tells_and_what_only_some_runs_have_makes_no_axis(
    bench: list[str], config: dict[str, Any]
) -> None:
    poisson = {**config["workload"], "kind": "poisson", "rate_req_s": 5.0}
    chunked = {"name": "chunked_prefill", "chunk_tokens": 8}
    run({**config, "engine": {"precision": "exact"}}, progress=False)
    run({**config, "workload": poisson, "scheduler": chunked}, progress=False)
    table = results("question")
    assert [name for name in table.columns if "." in name] == ["workload.kind"]
    assert table["precision"].tolist() == ["exact", "bf16"]


def test_an_edited_trace_is_told(bench: list[str], config: dict[str, Any], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    azure = {**config, "workload": {"kind": "azure", "path": "trace.csv", "num_requests": 1}}
    for length in (3, 4):
        trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:35:01,{length},4\n")
        run(azure, progress=False)
    said, table = told()
    assert len(table) == 2 and len(said) == 1 and "the table mixes 2 versions of trace trace.csv (" in said[0]


def test_code_and_machine_are_shown_where_they_differ(stored: list[Path]) -> None:
    assert not {"code", "machine"} & set(short_table(results("question")).columns)
    old = read_run(stored[0]).manifest
    stored_as(stored[0], "aaaaaaaaaaaa", code={"commit": "f" * 40}, machine={**old["machine"], "cores": 8})
    shown = short_table(told()[1])
    assert len(set(shown["code"])) == len(set(shown["machine"])) == 2


def test_no_runs_are_a_table_without_rows(stored: list[Path], config: dict[str, Any]) -> None:
    whole = results("question")
    said, table = told(evidence="simulated", failed=True)
    assert said == ["question: no simulated run; there are 2 measured runs"]
    assert len(table) == 0 and [name for name in whole.columns if "." not in name] == list(table.columns)[:-2]
    assert list(table.columns)[-2:] == ["status", "error"]
    for path in stored:
        shutil.rmtree(path)
    said, table = told()
    assert said == [] and len(table) == 0 and short_table(table).columns[0] == "scheduler"


def test_a_config_names_its_results_wherever_one_works(
    bench: list[str], config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({**config, "slo": {"ttft_s": 0.001, "tpot_s": 1.0}}))
    ids = [run(path, progress=False).paths[0].name]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "pyproject.toml").write_text("")
    for source in (path, str(path), load_config(path), load_config(path).to_dict()):
        monkeypatch.chdir(tmp_path if isinstance(source, dict) else tmp_path / "elsewhere")
        assert results(source)["run_id"].tolist() == ids
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert results(path)["slo_ttft_s"].tolist() == [0.001]
    assert results(path, slo={"ttft_s": 9.0, "tpot_s": 1.0})["request_goodput_req_s"].tolist()[0] > 0
    with pytest.raises(ConfigError, match="no such results"):
        results("question")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        results("none.yaml")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"evidence": 3}, "evidence: expected one or several of measured, .*, got 3"),
        ({"evidence": []}, "evidence: expected one or several of"),
        ({"evidence": [3]}, "evidence: unknown kind 3"),
        ({"slo": 3}, "slo: expected one of paper, .*, got 3"),
        ({"slo": {"ttft_s": 1.0}}, "slo: tpot_s: missing"),
        ({"slo": {"ttft_s": 1.0, "tpot": 1.0}}, "slo: unknown key 'tpot'; did you mean 'tpot_s'"),
        ({"slo": "papr"}, "slo: unknown preset 'papr'"),
    ],
)
def test_arguments_that_are_wrong(stored: list[Path], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        results("question", **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["paper", "checkpoints", "Paper"])
def test_reserved_folders_hold_no_experiment(stored: list[Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "results" / name).mkdir()
    with pytest.raises(ConfigError, match="no such results; experiments there: "):
        results(name)
