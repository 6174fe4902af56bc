"""`bench prefill` and `bench decode` on a device beside the CPU: rows, floor, bound, interrupts, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import hybridlab as hl
from hybridlab.bench import decode_devices as bench_decode_devices
from hybridlab.bench import prefill_devices as bench_prefill_devices
from hybridlab.bench.decode_devices import CPU, DUAL, PLAIN, decode
from hybridlab.bench.devices import DeviceBench, matmul_flop_s
from hybridlab.bench.prefill import step_flop
from hybridlab.bench.prefill_devices import LINK, RESIDENT, VARIANTS, Variant, prefill
from hybridlab.bench.steps import TimedStep, timed
from hybridlab.checkpoint import writer
from hybridlab.cli import bench as cli_bench
from hybridlab.cli.app import app
from hybridlab.errors import ConfigError, HybridlabError, MemoryBudgetError

EMULATED: dict[str, Any] = {"device": "emulated", "threads": 2, "progress": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints") / "tiny"
    hl.make_checkpoint(out, "tiny", dtype="fp8", seed=1, progress=False)
    return out


@pytest.fixture(scope="module")
def prompts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DeviceBench, Path]:
    out = tmp_path_factory.mktemp("rows")
    return prefill(checkpoint=tiny, tokens=[32, 8], steps=2, vram_gb=1, out=out, **EMULATED), out


@pytest.fixture(scope="module")
def tokens(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DeviceBench, Path]:
    out = tmp_path_factory.mktemp("rows")
    return decode(checkpoint=tiny, batch=[1, 3], depth=5, steps=3, beside_cpu=True, out=out, **EMULATED), out


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def error_line(done: Result) -> str:
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    (line,) = done.stderr.splitlines()
    return line


def test_prefill_measures_every_variant_at_every_length(prompts: tuple[DeviceBench, Path]) -> None:
    bench, _ = prompts
    assert bench.complete and bench.notes == ()
    assert tuple(bench.rows.columns) == bench_prefill_devices.COLUMNS
    measured = [row for row in bench.records if row["variant"] != LINK]
    expected = [(name, length) for name in VARIANTS for length in (8, 32)]
    assert sorted((row["variant"], row["tokens"]) for row in measured) == sorted(expected)
    for row in measured:
        assert (row["evidence"], row["steps"], row["device"], row["threads"]) == ("emulated", 2, "emulated", 2)
        assert row["ttft_s_min"] <= row["ttft_s"] <= row["ttft_s_max"]
        assert row["tokens_per_s"] * row["ttft_s"] == pytest.approx(row["tokens"])


def test_floor_and_utilisation_are_those_of_the_run(prompts: tuple[DeviceBench, Path], tiny: Path) -> None:
    records, spec = prompts[0].records, hl.open_checkpoint(tiny).spec
    all_bytes = len(spec.moe_layers) * spec.num_experts * spec.expert_bytes
    resident_s = {row["tokens"]: row["ttft_s"] for row in records if row["variant"] == RESIDENT}
    assert len(resident_s) == 2
    for row in records:
        if row["variant"] == RESIDENT:
            assert (row["vram_gb"], row["fraction"]) == (None, None)  # a yardstick has room, and no floor
            continue
        assert row["vram_gb"] == 1.0
        streams = row["variant"] != "CPU experts"
        assert row["load_bytes"] == (all_bytes if streams else 0)
        if row["variant"] == LINK:
            assert row["gb_s"] * row["seconds"] * 1e9 == pytest.approx(all_bytes)
            continue
        assert row["floor_s"] == max(row["link_s"], resident_s[row["tokens"]])
        assert row["fraction"] == pytest.approx(row["floor_s"] / row["ttft_s"])
        assert row["tflop_s"] * 1e12 == pytest.approx(step_flop(spec, row["tokens"]) / row["ttft_s"])
        if row["peak_tflop_s"] is not None:  # None without compiled kernels
            assert row["mfu"] == pytest.approx(row["tflop_s"] / row["peak_tflop_s"])
        assert (row["link_busy_s"] > 0) == (row["first_fill_s"] > 0) == streams


def test_prefill_rows_are_what_the_figure_reads(prompts: tuple[DeviceBench, Path]) -> None:
    bench, out = prompts
    lines = (out / "slp.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(bench.records)
    read = hl.figures.read_slp(out)
    assert read["machine"].tolist() == [row["machine"] for row in bench.records]
    table = hl.figures.slp_table(read)
    assert set(table["variant"]) == set(VARIANTS) - {RESIDENT}
    assert min(table["fraction"]) > 0


def test_decode_measures_plain_dual_and_the_cpu(tokens: tuple[DeviceBench, Path]) -> None:
    bench, out = tokens
    assert tuple(bench.rows.columns) == bench_decode_devices.COLUMNS
    expected = [(PLAIN, 1), (CPU, 1), (PLAIN, 3), (DUAL, 3), (CPU, 3)]
    assert [(row["variant"], row["batch"]) for row in bench.records] == expected
    for row in bench.records:
        assert row["tokens_per_s"] * row["tpot_s"] == pytest.approx(row["batch"])
        quartiles = [row[f"tpot_s{end}"] for end in ("_min", "_q1", "", "_q3", "_max")]
        assert quartiles == sorted(quartiles)
        if row["variant"] == PLAIN:
            assert row["times_plain"] == 1
        if row["variant"] == CPU:
            assert (row["device"], row["evidence"], row["bound_s"]) == ("cpu", "measured", None)
            continue
        assert (row["device"], row["evidence"], row["accelerator_threads"]) == ("emulated", "emulated", 1)
        assert 0 < row["fraction"] <= 1
        assert row["bound_s"] >= max(row["attention_busy_s"], row["experts_busy_s"]) > 0
    lines = (out / "decode.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(bench.records)


@pytest.mark.parametrize("which", ["prompts", "tokens"])
def test_result_is_shown_as_text_html_and_json(which: str, request: pytest.FixtureRequest) -> None:
    bench: DeviceBench = request.getfixturevalue(which)[0]
    found = json.loads(json.dumps(bench.as_dict(), allow_nan=False))
    assert found["rows"] == [dict(record) for record in bench.records]
    assert {"machine", "versions", "code", "notes", "complete"} <= found.keys()
    for shown in (str(bench), bench._repr_html_()):
        assert all(str(row["variant"]) in shown for row in bench.records)
        assert "emulated" in shown


def test_cli_prefill_on_a_device(tiny: Path, tmp_path: Path) -> None:
    words = ["--device", "emulated", "--checkpoint", tiny, "--tokens", "16", "--variants", "one buffer, sequential"]
    done = invoke("bench", "prefill", *words, "--steps", 1, "--threads", 2, "--out", tmp_path / "new", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["rows"]
    assert {row["variant"] for row in found} == {RESIDENT, LINK, "one buffer", "sequential"}
    assert len((tmp_path / "new" / "slp.jsonl").read_text(encoding="utf-8").splitlines()) == len(found)


def test_cli_prefill_that_measures_only_the_yardstick_has_failed(tiny: Path) -> None:
    """It has room in any case; what was asked for has none."""
    words = ["--device", "emulated", "--checkpoint", tiny, "--tokens", "16", "--steps", 1, "--threads", 2]
    done = invoke("bench", "prefill", *words, "--variants", "one buffer", "--vram-gb", "0.001", "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["failed"], found["complete"]) == (1, True, True)
    assert [row["variant"] for row in found["rows"]] == [RESIDENT] and "of GPU memory needed" in found["notes"][0]
    asked_for = invoke("bench", "prefill", *words, "--variants", RESIDENT)
    assert asked_for.exit_code == 0, asked_for.output


def test_cli_decode_on_a_device(tiny: Path) -> None:
    words = ["--device", "emulated", "--checkpoint", tiny, "--batch", "2", "--depth", 0, "--steps", 1, "--threads", 2]
    done = invoke("bench", "decode", *words)
    assert done.exit_code == 0, done.output
    assert PLAIN in done.stdout and DUAL in done.stdout and CPU not in done.stdout


def test_commands_name_the_variants() -> None:
    assert tuple(VARIANTS) == cli_bench.VARIANTS


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("prefill --device cpu --variants sequential", "--variants is for --device cuda or emulated"),
        ("prefill --vram-gb 3", "--vram-gb is for --device cuda or emulated"),
        ("prefill --out x", "--out is for --device cuda or emulated"),
        ("decode --beside-cpu", "--beside-cpu is for --device cuda or emulated"),
        ("prefill --tokens 1,2", "--tokens: several are for --device"),
        ("decode --batch 1,2", "--batch: several are for --device"),
        ("prefill --tokens 0", "tokens is 0"),
        ("prefill --device emulated --tokens 0", "tokens: expected ints >= 1, got 0"),
        ("prefill --device emulated --tokens 1,x", "--tokens: expected numbers such as 1,2,4, got 'x'"),
        ("prefill --device emulated --tokens 99999999", "the model takes prompts of up to"),
        ("prefill --device emulated --variants one,two", "variants: unknown 'one', expected some of all resident"),
        ("prefill --device emulated --link-gb-s -1", "link_gb_s is -1.0"),
        ("prefill --device emulated --threads 1", "device 'emulated' needs 2 threads, one for each side; there is 1"),
        ("prefill --device tpu", "device is 'tpu', expected one of cuda, emulated"),
        ("prefill --device cuda --link-gb-s 3", "link_gb_s is for device 'emulated'"),
        ("decode --device emulated --batch 0", "batch: expected ints >= 1, got 0"),
        ("decode --device emulated --batch 1,none", "--batch: expected numbers such as 1,2,4, got 'none'"),
        ("decode --device emulated --depth 99999999", "positions needed, the model has"),
        ("decode --device emulated --weight-layout foo", "weight_layout is 'foo'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, shown: str
) -> None:
    monkeypatch.setattr(writer, "make_checkpoint", _not_reached)
    monkeypatch.chdir(tmp_path)
    assert shown in error_line(invoke("bench", *words.split(), "--preset", "tiny", *_two_threads(words)))
    assert list(tmp_path.iterdir()) == []


def _two_threads(words: str) -> list[str]:
    return [] if "--threads" in words or "--device emulated" not in words else ["--threads", "2"]


def _not_reached(*_: object, **__: object) -> None:
    raise AssertionError("only after the mistake was told")


def test_rows_that_cannot_be_written_are_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"slp\.jsonl: cannot be written"):
        prefill("tiny", out=tmp_path / "file", **EMULATED)


def failing(error: BaseException, *, from_call: int) -> Callable[..., TimedStep]:
    """`timed`, which raises from its so-manieth call on."""
    calls = 0

    def step(*arguments: Any) -> TimedStep:
        nonlocal calls
        calls += 1
        if calls >= from_call:
            raise error
        return timed(*arguments)

    return step


def test_an_interrupt_keeps_what_was_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A warm-up and two steps at 8 tokens, a warm-up and one step at 16.
    monkeypatch.setattr(bench_prefill_devices, "timed", failing(KeyboardInterrupt(), from_call=6))
    words = ["--device", "emulated", "--checkpoint", tiny, "--tokens", "8,16", "--steps", 2, "--threads", 2]
    done = invoke("bench", "prefill", *words, "--out", tmp_path, "--json")
    assert done.exit_code == 130
    found = json.loads(done.stdout)
    assert [(row["variant"], row["tokens"], row["steps"]) for row in found["rows"]] == [
        (RESIDENT, 8, 2),
        (RESIDENT, 16, 1),
    ]
    assert found["complete"] is False and found["notes"] == ["interrupted after 2 rows"]
    assert len((tmp_path / "slp.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_an_interrupt_before_the_first_row_is_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode_devices, "timed", failing(KeyboardInterrupt(), from_call=1))
    with pytest.raises(KeyboardInterrupt):
        decode(checkpoint=tiny, batch=1, depth=0, steps=1, **EMULATED)


def test_a_variant_that_does_not_fit_is_noted(tiny: Path) -> None:
    def small(*arguments: Any, **options: Any) -> hl.Engine:
        if options["token_budget"] > 8:
            raise MemoryBudgetError("no room")
        return hl.load(*arguments, **options)

    ring = VARIANTS["ring of 2 layers"]
    variants = [replace(ring, name="small", make=small), ring]
    bench = prefill(checkpoint=tiny, tokens=[8, 16], steps=1, variants=variants, **EMULATED)
    found = [(row["variant"], row["tokens"]) for row in bench.records if row["variant"] != LINK]
    assert found == [(RESIDENT, 8), (RESIDENT, 16), ("small", 8), (ring.name, 8), (ring.name, 16)]
    assert bench.notes == ("small, 16 tokens: no room",)


def test_a_failed_step_ends_its_variant_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_prefill_devices, "timed", failing(HybridlabError("the step failed: x"), from_call=3))
    bench = prefill(checkpoint=tiny, tokens=8, steps=1, variants=["one buffer"], **EMULATED)
    assert [row["variant"] for row in bench.records] == [RESIDENT]
    assert bench.notes == ("one buffer: the step failed: x",)


def test_a_failed_step_of_a_large_batch_keeps_the_small_ones(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = bench_decode_devices.WARMUP + 1
    monkeypatch.setattr(
        bench_decode_devices, "timed", failing(HybridlabError("the step <b> failed"), from_call=small + 1)
    )
    bench = decode(checkpoint=tiny, batch=[1, 2], depth=0, steps=1, **EMULATED)
    assert [(row["variant"], row["batch"]) for row in bench.records] == [(PLAIN, 1)]
    assert bench.notes == ("ended after 1 rows: the step <b> failed",)
    assert "&lt;b&gt; failed" in bench._repr_html_()


def test_nothing_measured_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_prefill_devices, "timed", failing(HybridlabError("the step failed: x"), from_call=1))
    with pytest.raises(HybridlabError, match="the step failed: x"):
        prefill(checkpoint=tiny, tokens=8, steps=1, variants=["one buffer"], **EMULATED)


def test_long_prompts_are_not_asked_of_the_cpu(tiny: Path) -> None:
    short = Variant("short ones", "all_host", most_tokens=8)
    bench = prefill(checkpoint=tiny, tokens=[8, 16], steps=1, variants=[short], **EMULATED)
    assert [(row["variant"], row["tokens"]) for row in bench.records] == [
        (RESIDENT, 8),
        (RESIDENT, 16),
        ("short ones", 8),
    ]
    assert bench.notes == ("short ones: left out from 16 tokens on, since a step would take long",)


def test_prompts_are_as_long_as_the_model_takes(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setitem(bench_prefill_devices.LENGTHS, "emulated", (8, 10**9))
    bench = prefill(checkpoint=tiny, steps=1, variants=["one buffer"], **EMULATED)
    assert {row["tokens"] for row in bench.records} == {8}


def test_matmul_rate_is_positive() -> None:
    assert matmul_flop_s("cpu", size=32, repeats=2) > 0
