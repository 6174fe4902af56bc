"""Bad input: one line on stderr, exit status 2, nothing on stdout, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import hybridlab as hl
from hybridlab.bench import kernels as bench_kernels
from hybridlab.bench import peers as bench_peers
from hybridlab.bench.shapes import LAYERS
from hybridlab.checkpoint import writer
from hybridlab.cli import bench as cli_bench
from hybridlab.cli.app import app


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def _not_reached(*_: object, **__: object) -> None:
    raise AssertionError("only after the mistake was told")


def error_line(done: Result) -> str:
    """The one line; also checks that it is the only one and that stdout is empty."""
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("hybridlab: error: ")
    return line


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ("1,x,3", "got 'x' at position 1"),
        ("1,-2", "got '-2' at position 1"),
        ("", "got '' at position 0"),
        ("1,,2", "got '' at position 1"),
        ("1.5", "got '1.5' at position 0"),
        ("1,²", "got '²' at position 1"),
        ("1 2", "got '1 2' at position 0"),
    ],
)
def test_token_lists_with_junk(tokens: str, shown: str) -> None:
    assert shown in error_line(invoke("generate", "nowhere", "--tokens", tokens))


@pytest.mark.parametrize("words", [[], ["--tokens", "1", "--text", "a"]])
def test_generate_wants_one_prompt(words: list[str]) -> None:
    assert "--tokens or as --text" in error_line(invoke("generate", "nowhere", *words))


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "{}", "--tokens", "1"],
        ["checkpoint", "info", "{}"],
        ["run", "{}"],
        ["bench", "decode", "--checkpoint", "{}"],
    ],
)
def test_missing_paths_are_named(tmp_path: Path, words: list[str]) -> None:
    missing = tmp_path / "missing"
    line = error_line(invoke(*(word.format(missing) for word in words)))
    assert str(missing) in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--preset", "nonsense"], "nonsense"),
        (["--preset", "tiny", "--dtype", "int3"], "int3"),
        (["--preset", "tiny", "--routing", "sideways"], "sideways"),
    ],
)
def test_unknown_checkpoint_choices(tmp_path: Path, words: list[str], shown: str) -> None:
    assert shown in error_line(invoke("checkpoint", "make", *words, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    assert str(out) in error_line(invoke("checkpoint", "make", "--preset", "tiny", out))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--preset", "tiny", "--checkpoint", "x"], "not both"),
        (["--checkpoint", "x", "--layers", "2"], "--layers cuts a preset"),
        (["--preset", "nonsense"], "nonsense"),
    ],
)
def test_bench_choices(words: list[str], shown: str) -> None:
    assert shown in error_line(invoke("bench", "decode", *words))


@pytest.mark.parametrize("command", ["decode", "prefill"])
def test_an_unknown_weight_layout_writes_no_checkpoint(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(writer, "make_checkpoint", _not_reached)
    done = invoke("bench", command, "--preset", "tiny", "--weight-layout", "foo")
    assert "weight_layout is 'foo', expected 'rows' or 'tiles'" in error_line(done)


@pytest.mark.parametrize("inside", ["", "more"])
def test_bench_kernels_wants_a_folder_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    monkeypatch.setattr(bench_kernels, "run", _not_reached)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    out = tmp_path / "file" / inside
    assert f"{out}: expected a folder" in error_line(invoke("bench", "kernels", "--quick", "--out", out))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_mistake_leaves_no_folder_of_bench_kernels(tmp_path: Path) -> None:
    done = invoke("bench", "kernels", "--shape", "nonsense", "--out", tmp_path / "new" / "out")
    assert "unknown model 'nonsense'" in error_line(done)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--rows", "--threads"])
@pytest.mark.parametrize("text", ["1,x", "9" * 5000])
def test_bench_kernels_counts(option: str, text: str) -> None:
    line = error_line(invoke("bench", "kernels", option, text))
    assert f"{option}: expected numbers" in line
    assert len(line) < 160


def test_bench_kernels_names_what_can_be_given() -> None:
    assert tuple(LAYERS) == cli_bench.SHAPES
    assert tuple(bench_peers.PEERS) == cli_bench.PEERS
    shown = invoke("bench", "kernels", "--help").stdout
    assert all(name in shown for name in (*LAYERS, *bench_peers.PEERS))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["generate", "x", "--tokens", "1", "--max-tokens", "0"], "'--max-tokens'"),
        (["generate", "x", "--tokens", "1", "--threads", "0"], "'--threads'"),
        (["generate", "x", "--tokens", "1", "--temperature", "-1"], "'--temperature'"),
        (["generate", "x", "--tokens", "1", "--temperature", "nan"], "--temperature"),
        (["bench", "decode", "--batch", "none"], "--batch: expected numbers such as 1,2,4, got 'none'"),
        (["checkpoint", "make", "out"], "--preset"),
        (["nonsense"], "'nonsense'"),
        (["run"], "argument"),
        (["doctor", "--nonsense"], "--nonsense"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_usage_errors_are_one_line(words: list[str], shown: str) -> None:
    assert shown in error_line(invoke(*words))


def test_system_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "results/x")

    monkeypatch.setattr(hl, "run", full, raising=False)
    assert "No space left on device: 'results/x'" in error_line(invoke("run", "config.yaml"))


def test_multi_line_messages_become_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise hl.HybridlabError("first\n  second")

    monkeypatch.setattr(hl, "run", fail, raising=False)
    assert error_line(invoke("run", "config.yaml")) == "hybridlab: error: first second"


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hl, "run", interrupted, raising=False)
    done = invoke("run", "config.yaml")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "hybridlab: interrupted\n")


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(hl, "run", broken, raising=False)
    assert isinstance(invoke("run", "config.yaml").exception, ZeroDivisionError)


def test_process_exit_status_and_streams(tmp_path: Path) -> None:
    """The real script: status 2 and one line, from a process that never imported torch."""
    words = [sys.executable, "-X", "importtime", "-m", "hybridlab", "generate", "x", "--tokens", "1,-1"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1)
    assert "| torch" not in done.stderr


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["nowhere", "--device", "emulated"], "nowhere"),
        (["nowhere", "--device", "cpu"], "device is 'cpu', expected one of cuda, emulated"),
        (["nowhere", "--device", "emulated", "--requests", "1"], "--requests"),
        (["nowhere", "--device", "emulated", "--seconds", "nan"], "seconds is nan, expected a finite number > 0"),
        (["nowhere", "--device", "emulated", "--threads", "2", "--link-gb-s", "0"], "link_gb_s is 0.0"),
        ([], "Missing argument"),
    ],
)
def test_calibrate_with_bad_input(words: list[str], shown: str) -> None:
    assert shown in error_line(invoke("calibrate", *words))
