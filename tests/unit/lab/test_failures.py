"""Runs that fail are recorded and told; the others go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridlab import backends, experiment
from hybridlab.errors import CheckpointError, ConfigError, HybridlabError, MemoryBudgetError, StrategyError
from hybridlab.store import results

Hook = Callable[[Callable[[str, Any, int | None], None]], None]


@pytest.fixture
def hook(bench: list[str], monkeypatch: pytest.MonkeyPatch) -> Hook:
    """Sets what the fake bench does before it checks, loads or serves."""
    return lambda function: monkeypatch.setattr(backends.BACKENDS["engine"], "hook", staticmethod(function))


@pytest.fixture
def three(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "sweep": {"workload.num_requests": [1, 2, 3]}}


def run(config: Any, **keys: Any) -> experiment.ExperimentResult:
    return experiment.run(config, **{"progress": False, **keys})


def fail_at(count: int, error: BaseException) -> Callable[[str, Any, int | None], None]:
    def hook(what: str, bench: Any, number: int | None) -> None:
        if what == "serve" and number == count:
            raise error

    return hook


def test_a_failed_run_is_recorded_and_the_sweep_goes_on(bench: list[str], three: dict[str, Any], hook: Hook) -> None:
    hook(fail_at(2, StrategyError("scheduler Mine\nbreaks its contract")))
    warned = r"question: 1 of 3 runs failed \(retry_failed=True .*\); the first: StrategyError: scheduler Mine breaks"
    with pytest.warns(UserWarning, match=warned):
        result = run(three)
    assert result.summary["num_requests"].tolist() == [1, 3]
    assert [f.error for f in result.failed] == ["StrategyError: scheduler Mine breaks its contract"]
    assert repr(result) == "ExperimentResult('question', 2 runs, 0 cached, 1 failed)"
    assert "1 failed (retry_failed=True" in result._repr_html_()
    # What broke off may leave an engine in any state: the next run has one of its own.
    assert bench == ["open", "serve FCFS 1", "close", "open", "serve FCFS 3", "close"]
    (folder,) = (f.path for f in result.failed)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "failed" and "in hook\n" in manifest["traceback"]
    assert manifest["axes"] == {"workload.num_requests": 2} and manifest["machine"] and manifest["config"]


def test_later_calls_skip_it_and_say_so_until_it_is_retried(
    bench: list[str], three: dict[str, Any], hook: Hook, capsys: pytest.CaptureFixture[str]
) -> None:
    hook(fail_at(2, RuntimeError("broke")))
    with pytest.warns(UserWarning, match="1 of 3 runs failed"):
        run(three)
    bench.clear()
    with pytest.warns(UserWarning, match="1 of 3 runs failed"):
        again = run(three, progress=True)
    assert bench == [] and len(again.cached) == 2 and len(again.failed) == 1
    said = capsys.readouterr().out
    assert "cached: 2 of 3 runs" in said and "failed earlier: 1 of 3 runs left out (retry_failed=True" in said

    with pytest.warns(UserWarning, match="1 of 3 runs failed"):
        run(three, retry_failed=True)  # fails again
    hook(lambda what, bench, number: None)
    bench.clear()
    table = experiment.sweep(three, retry_failed=True, progress=False)
    assert bench == ["open", "serve FCFS 2", "close"]
    assert table["num_requests"].tolist() == [1, 2, 3]
    assert len(results("question", failed=True)) == 3 and set(results("question", failed=True)["status"]) == {"done"}


def test_results_leave_failed_runs_out_unless_asked(three: dict[str, Any], hook: Hook) -> None:
    hook(fail_at(3, MemoryBudgetError("9 GiB needed, 1 GiB in the budget")))
    with pytest.warns(UserWarning, match="1 of 3"):
        run(three)
    with pytest.warns(UserWarning, match="^question: 1 failed run left out; failed=True shows them$"):
        table = results("question")
    assert table["num_requests"].tolist() == [1, 2] and "status" not in table.columns
    every = results("question", failed=True)
    assert every["status"].tolist() == ["done", "done", "failed"]
    assert every["error"].tolist()[2] == "MemoryBudgetError: 9 GiB needed, 1 GiB in the budget"
    assert every["workload.num_requests"].tolist() == [1, 2, 3]
    assert every["median_ttft_s"].isna().tolist() == [False, False, True]


@pytest.mark.parametrize("progress", [False, True])
def test_if_every_run_failed_the_first_error_is_raised(
    config: dict[str, Any], three: dict[str, Any], hook: Hook, progress: bool
) -> None:
    def refuse(what: str, bench: Any, number: int | None) -> None:
        if what == "load":
            raise MemoryBudgetError("9 GiB needed")

    hook(refuse)
    with pytest.raises(MemoryBudgetError, match=r"^9 GiB needed$"):
        run(three, progress=progress)
    with pytest.raises(
        HybridlabError, match=r"^all 3 runs failed earlier \(retry.*\): MemoryBudgetError: 9 GiB needed$"
    ):
        run(three, progress=progress)
    with pytest.raises(HybridlabError, match=r"^the run failed earlier \(retry"):
        run(config, progress=progress)  # the same run as the last of the three
    with pytest.raises(MemoryBudgetError, match=r"^9 GiB needed$"):
        experiment.sweep(three, retry_failed=True, progress=progress)


def test_an_error_of_the_users_code_keeps_its_traceback(config: dict[str, Any], hook: Hook) -> None:
    hook(fail_at(3, ZeroDivisionError("in schedule()")))
    with pytest.raises(ZeroDivisionError, match=r"in schedule\(\)") as caught:
        run(config)
    assert caught.traceback[-1].name == "hook"


def test_a_warm_up_that_fails_is_a_failed_run(bench: list[str], config: dict[str, Any], hook: Hook) -> None:
    hook(fail_at(1, StrategyError("no")))
    with pytest.raises(StrategyError):
        run({**config, "warmup_requests": 1})
    assert bench == ["open", "close"]


def test_a_forced_run_that_fails_loses_nothing(config: dict[str, Any], hook: Hook) -> None:
    before = run(config).summary
    hook(fail_at(3, RuntimeError("broke")))
    with pytest.raises(RuntimeError, match="broke"):
        run(config, force=True)
    assert run(config).summary.equals(before)


@pytest.mark.parametrize(
    ("what", "error"),
    [("check", ConfigError("threads is 1000, expected an int from 1 to 8")), ("load", CheckpointError("bad head"))],
)
def test_errors_name_the_file_of_the_config(
    config: dict[str, Any], hook: Hook, tmp_path: Path, what: str, error: HybridlabError
) -> None:
    import yaml

    path = tmp_path / "experiments.yaml"
    path.write_text(yaml.safe_dump(config))

    def refuse(now: str, bench: Any, number: int | None) -> None:
        if now == what:
            raise error

    hook(refuse)
    with pytest.raises(type(error)) as caught:
        run(path)
    assert str(caught.value) == f"{path}: {error}"


@pytest.mark.parametrize("change", [{"scheduler": "fcsf"}, {"model": {"path": "nowhere"}}, {"model": {"preset": "x"}}])
def test_errors_before_a_run_name_the_file_once(
    bench: list[str], config: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    import yaml

    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**config, **change}))
    with pytest.raises(HybridlabError) as caught:
        run(path)
    assert str(caught.value).count(f"{path}: ") == 1 and str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_stops_every_run_is_raised_before_the_first(
    bench: list[str], config: dict[str, Any], hook: Hook, tmp_path: Path
) -> None:
    def refuse(what: str, bench: Any, number: int | None) -> None:
        if what == "check" and bench.config.engine.device == "cuda":
            raise ConfigError("device 'cuda' is not available")

    hook(refuse)
    with pytest.raises(ConfigError, match="not available"):
        run({**config, "sweep": {"engine.device": ["cpu", "cuda"]}})
    assert bench == [] and not (tmp_path / "results").exists()


def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on(
    bench: list[str], three: dict[str, Any], hook: Hook, capsys: pytest.CaptureFixture[str]
) -> None:
    hook(fail_at(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(three)
    said = "hybridlab: interrupted; 1 of 3 runs are done and stored; calling again resumes\n"
    assert capsys.readouterr().err == said
    assert bench == ["open", "serve FCFS 1", "close"]
    hook(lambda what, bench, number: None)
    bench.clear()
    result = run(three)
    assert bench == ["open", "serve FCFS 2", "serve FCFS 3", "close"]
    assert len(result.cached) == 1 and not result.failed and len(results("question", failed=True)) == 3
