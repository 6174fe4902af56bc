"""`hl.calibrate` on device "emulated", its files, and what loading makes of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibration

import hybridlab as hl
from hybridlab.calibration import steps as calibration_steps
from hybridlab.calibration.files import (
    calibration_path,
    find_calibration,
    read_calibration,
    subject_of,
    write_calibration,
)
from hybridlab.calibration.results import Crossovers
from hybridlab.config import load_config
from hybridlab.errors import ConfigError
from hybridlab.jobs import identify, make_drafts
from hybridlab.plans import StepPlan
from hybridlab.spec import NEVER

LOADED: dict[str, Any] = {"device": "emulated", "threads": 2}
QUICK: dict[str, Any] = {
    "threads": 2,
    "max_tokens": 32,
    "requests": (2, 3),
    "depth": 8,
    "repeats": 2,
    "progress": False,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hl.make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "tiny").folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYBRIDLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def planted(tiny: Path, thresholds: Crossovers, **loaded: Any) -> Path:
    """A calibration of the tiny model on this machine that says so."""
    subject = subject_of(hl.open_checkpoint(tiny).spec, **{**LOADED, **loaded})
    return write_calibration(replace(calibration(), subject=subject, crossovers=thresholds))


def path_kind(engine: hl.Engine, tokens: int) -> str:
    prefetch = engine.planner.shape("main", StepPlan("prefill", {"r": tokens})).path.prefetch
    return "streamed" if prefetch is None else "mixed" if prefetch else "cpu"


def test_every_path_is_measured_and_loading_takes_what_was_found(tiny: Path, cache: Path) -> None:
    found = hl.calibrate(tiny, "emulated", **QUICK)
    assert found.complete and found.evidence == "emulated" and found.layers == 3
    by_path = {(one.kind, one.path, one.share, one.min_tokens, one.tokens) for one in found.points}
    expected = {("prefill", "cpu", 0.0, 0, n) for n in (1, 4, 16, 32)} | {
        ("prefill", "streamed", 1.0, 1, n) for n in (1, 4, 16, 32)
    }
    expected |= {("prefill", "mixed", share, 1, n) for share in (0.25, 0.5, 0.75) for n in (1, 4, 16, 32)}
    expected |= {("prefill", "mixed", 0.5, least, n) for least in (4, 16) for n in (4, 16, 32) if n >= least}
    expected |= {("decode", path, 0.0, 0, n) for path in ("plain", "dual batch") for n in (2, 3)}
    # A path that fell far behind the streamed one is not measured at more tokens.
    assert by_path <= expected
    assert {key for key in expected if key[0] == "decode" or key[1] == "streamed" or key[4] == 1} <= by_path
    for one in found.points:
        assert 0 < one.layer_s_min <= one.layer_s <= one.layer_s_max and one.layer_s <= one.step_s
        on_cpu, streams = one.path != "streamed", one.path in ("streamed", "mixed")
        assert (one.cpu_experts_s > 0, one.link_s > 0, one.gpu_experts_s > 0) == (on_cpu, streams, streams)
        assert one.other_s > 0 and one.repeats == 2
    assert found.crossovers == Crossovers.of(found.points)
    (kept,) = (cache / "calibrations").iterdir()
    assert read_calibration(kept) == found
    with hl.load(tiny, placement="streamed", overlap="dual_batch", quiet=True, **LOADED) as engine:
        hardware = engine.planner.hardware
        assert hardware == found.applied(replace(hardware, calibrated=""))
        assert f"thresholds=calibrated {found.day}, code {found.code}" in repr(engine)
        overlap: Any = engine.planner.overlap
        assert overlap.min_requests == found.crossovers.dual_batch_from_requests


def test_a_few_layers_stand_for_the_others(tiny: Path) -> None:
    found = hl.calibrate(tiny, "emulated", **QUICK, layers=1, save=False)
    assert found.layers == 1
    assert found.points and all(one.step_s >= 3 * one.layer_s * 0.999 for one in found.points)
    whole = hl.open_checkpoint(tiny)
    cut = whole.first_moe_layers(2)
    assert cut.spec.num_layers == 3 and cut.spec.dense_layers == whole.spec.dense_layers
    assert cut.num_bytes < whole.num_bytes and not cut.has("model.layers.3.mlp.gate.weight")
    assert whole.first_moe_layers(9) is whole


def test_streamed_follows_what_was_measured(tiny: Path) -> None:
    planted(tiny, Crossovers(100, 10, 200, 0.5, 2, 1.3, 4, 8))
    with hl.load(tiny, placement="streamed", overlap="dual_batch", quiet=True, **LOADED) as engine:
        assert [path_kind(engine, n) for n in (9, 10, 199, 200)] == ["cpu", "mixed", "mixed", "streamed"]
        shape = engine.planner.shape("main", StepPlan("prefill", {"r": 50}))
        assert shape.path.min_tokens == 2
        assert {len(experts) for experts in shape.path.prefetch or ()} == {0, 8}  # a dense layer, and half of 16
        batches = [
            engine.planner.shape("main", StepPlan("decode", {str(i): 1 for i in range(n)})) for n in (3, 4, 8, 9)
        ]
        assert [shape.num_microbatches for shape in batches] == [1, 2, 1, 1]
    with hl.load(tiny, placement={"name": "streamed", "stream_from_tokens": 7}, quiet=True, **LOADED) as engine:
        assert [path_kind(engine, n) for n in (6, 7)] == ["cpu", "streamed"]
    planted(tiny, Crossovers(stream_from_tokens=NEVER))
    with hl.load(tiny, placement="streamed", quiet=True, **LOADED) as engine:
        assert path_kind(engine, 10**6) == "cpu"


def test_what_was_calibrated_for_something_else_is_not_taken(tiny: Path) -> None:
    planted(tiny, Crossovers(100), link_gb_s=2.0)
    planted(tiny, Crossovers(100), threads=3)
    planted(tiny, Crossovers(100), precision="exact")
    with hl.load(tiny, placement="streamed", quiet=True, **LOADED) as engine:
        assert engine.planner.hardware.stream_from_tokens is None
        assert "thresholds=not calibrated, the paper's" in repr(engine)
        assert path_kind(engine, 4095) == "cpu" and path_kind(engine, 4096) == "streamed"
    with hl.load(tiny, placement="streamed", quiet=True, link_gb_s=2, **LOADED) as engine:
        assert engine.planner.hardware.stream_from_tokens == 100
    with hl.load(tiny, quiet=True, threads=2) as engine:
        assert "thresholds" not in repr(engine)


def test_mixed_steps_compute_what_the_others_do(tiny: Path) -> None:
    prompt = list(range(1, 25))
    with hl.load(tiny, precision="exact", quiet=True, threads=2) as engine:
        expected = engine.generate(prompt, 6)
    planted(tiny, Crossovers(100, 1, NEVER, 0.5, 3), precision="exact")
    with hl.load(tiny, placement="streamed", overlap="prefetch", precision="exact", quiet=True, **LOADED) as engine:
        assert path_kind(engine, len(prompt)) == path_kind(engine, 1) == "mixed"
        assert engine.generate(prompt, 6) == expected


def test_a_run_with_other_thresholds_is_another_run(tiny: Path) -> None:
    config = load_config(
        {"experiment": "x", "model": {"path": str(tiny)}, "engine": {"device": "emulated", "threads": 2},
         "workload": {"kind": "offline", "num_requests": 1, "prompt_tokens": 4, "output_tokens": 2}}
    )  # fmt: skip

    def run_id() -> str:
        (job,) = identify(make_drafts(config, tiny.parent), "engine")
        return job.run_id

    without = run_id()
    path = planted(tiny, Crossovers(100))
    first = run_id()
    planted(tiny, Crossovers(200))
    assert len({without, first, run_id()}) == 3
    path.unlink()
    assert run_id() == without


def test_an_interrupt_keeps_the_points_but_no_file(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = calibration_steps.timed, []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(calibration_steps, "timed", interrupted)
    found = hl.calibrate(tiny, "emulated", **QUICK)
    # Four rounds of warm-up and two repeats of two paths are 12 steps; a third size was begun.
    assert not found.complete and {(one.kind, one.tokens) for one in found.points} == {("decode", 2), ("decode", 3)}
    assert found.crossovers.stream_from_tokens is None and not cache.exists()
    calls[:] = [()] * 30
    with pytest.raises(KeyboardInterrupt):
        hl.calibrate(tiny, "emulated", **QUICK)


def test_longer_prompts_are_left_out_when_the_time_is_over(tiny: Path) -> None:
    found = hl.calibrate(tiny, "emulated", **QUICK, seconds=1e-9)
    assert found.complete and found.points == () and found.crossovers == Crossovers()
    with hl.load(tiny, placement="streamed", quiet=True, **LOADED) as engine:
        assert engine.planner.hardware.stream_from_tokens is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cpu"}, "device is 'cpu', expected one of cuda, emulated"),
        ({"layers": 0}, "layers is 0, expected an int >= 1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, expected an int >= 1"),
        ({"seconds": 0}, "seconds is 0, expected a finite number > 0"),
        ({"requests": ()}, "requests: expected at least one number"),
        ({"repeats": 1}, "repeats: expected at least 2, got 1"),
        ({"requests": (1, 2)}, "requests: expected at least 2, got 1"),
        ({"link_gb_s": -1.0}, "link_gb_s is -1.0"),
        ({"precision": "fp4"}, "precision is 'fp4'"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(tiny: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        hl.calibrate(tiny, **{"device": "emulated", **QUICK, **changes})


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    given = calibration(link_gb_s=2.0)
    path = write_calibration(given, tmp_path / "deep" / "down.json")
    assert read_calibration(path) == given
    again = calibration(evidence="emulated")
    assert write_calibration(again, path) == path
    assert read_calibration(path) == again and os.listdir(path.parent) == ["down.json"]
    assert find_calibration(given.subject) is None
    write_calibration(given)
    assert find_calibration(given.subject) == given
    assert find_calibration(replace(given.subject, link_gb_s=3.0)) is None


def test_the_folder_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subject = calibration().subject
    assert calibration_path(subject).parent == tmp_path / "cache" / "calibrations"
    monkeypatch.delenv("HYBRIDLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert calibration_path(subject).parent == tmp_path / "xdg" / "hybridlab" / "calibrations"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibration_path(subject).parent == tmp_path / ".cache" / "hybridlab" / "calibrations"


def damaged(**changes: Any) -> str:
    data: Any = json.loads(json.dumps({"format": "hybridlab-calibration/1", **asdict(calibration())}))
    for key, value in changes.items():
        *parents, last = key.split("__")
        node: Any = data
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node[parent]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged (Expecting value"),
        ("{", "damaged (Expecting"),
        ("[]", "expected a calibration ('hybridlab-calibration/1'), found None"),
        ('{"a": 1, "a": 2}', "damaged (a key appears twice)"),
        ("[" * 100_000, "damaged ("),
        (damaged(format="other/1"), "found 'other/1'"),
        (damaged(points__0__layer_s=-1.0), "damaged (points.0.layer_s: "),
        (damaged(points__0__layer_s="fast"), "damaged (points.0.layer_s: "),
        (damaged(points__0__step_s=float("nan")), "damaged (points.0.step_s: "),
        (damaged(points__0__path="teleport"), "damaged (points.0.path: "),
        (damaged(crossovers__stream_from_tokens=0), "damaged (crossovers.stream_from_tokens: "),
        (damaged(crossovers__stream_from_tokens=10.5), "damaged (crossovers.stream_from_tokens: "),
        (damaged(crossovers__extra=1), "damaged (crossovers.extra: "),
        (damaged(subject=None), "damaged (subject: missing"),
        (damaged(day="today"), "damaged (day: "),
        (damaged(evidence="guessed"), "damaged (evidence: "),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tiny: Path, text: str, words: str) -> None:
    path = planted(tiny, Crossovers())
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        hl.load(tiny, quiet=True, **LOADED)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message
    assert message.endswith("delete it and run `hybridlab calibrate` again")


def test_a_file_of_something_else_under_this_name(tiny: Path) -> None:
    path = planted(tiny, Crossovers())
    write_calibration(calibration(), path)
    with pytest.raises(ConfigError, match="it is of another machine or model"):
        hl.load(tiny, quiet=True, **LOADED)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_calibration(calibration(), tmp_path / "kept.json")
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"kept.json: the calibration cannot be written \(No space left on device\)"):
        write_calibration(calibration(evidence="emulated"), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["kept.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_calibration(calibration(), tmp_path / "file" / "below.json")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_a_gpu(tiny: Path) -> None:
    found = hl.calibrate(tiny, "cuda", **QUICK, vram_gb=4.0)
    assert found.complete and found.evidence == "measured"
    assert {one.path for one in found.points} == {"cpu", "mixed", "streamed", "plain", "dual batch"}
    assert found.crossovers.stream_from_tokens is not None
    with hl.load(tiny, device="cuda", threads=2, placement="streamed", vram_gb=4.0, quiet=True) as engine:
        assert engine.planner.hardware.stream_from_tokens == found.crossovers.stream_from_tokens
