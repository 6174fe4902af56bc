"""experiments/slp/gpu.py without a GPU: it runs, and what it puts in the engine's place is what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hybridlab as hl
from hybridlab.bench.decode_devices import CPU, DUAL, PLAIN
from hybridlab.bench.prefill_devices import LINK, RESIDENT
from hybridlab.engine import cuda_device
from hybridlab.engine.shared_blocks import host_store
from hybridlab.lowering import Planner
from hybridlab.plans import Op, Program, Span, StepPlan
from hybridlab.spec import HardwareSpec
from hybridlab.strategies.overlap.prefetch import Prefetch
from hybridlab.strategies.placement.streamed import Streamed

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "data" / "oracles" / "qwen3_bf16"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("slp_gpu", ROOT / "experiments" / "slp" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def test_script_measures_prefill_and_decode(gpu: ModuleType, tmp_path: Path) -> None:
    words = ["--checkpoint", str(ORACLE), "--device", "emulated", "--tokens", "8", "--steps", "1", "--decode", "2"]
    gpu.main([str(tmp_path), *words, "--depth", "3", "--variants", "one buffer"])
    prompts, tokens = (
        [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        for name in ("slp.jsonl", "decode.jsonl")
    )
    assert [row["variant"] for row in prompts] == [RESIDENT, LINK, "one buffer"]
    assert [row["variant"] for row in tokens] == [PLAIN, DUAL]


def test_unknown_variants_are_told(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--variants", "sequential,rings"])
    assert "--variants: unknown 'rings'" in capsys.readouterr().err


class Recorder:
    """Lanes that run a program in its execution order, and write down what they do."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def run(self, program: Program, execute: Callable[[Op], None], clock_start_s: float) -> tuple[Span, ...]:
        for op in program.order:
            self.done.append(f"{op.kind} {op.layer}")
            execute(op)
        return ()


def test_a_layers_loads_go_with_the_layer_before(gpu: ModuleType) -> None:
    spec, lanes = hl.open_checkpoint(ORACLE).spec, Recorder()
    hardware = HardwareSpec("a machine", "emulated", 2, 2**30, gpu_memory_bytes=2**30)
    placement = Streamed(stream_from_tokens=1)
    placed = placement.place(spec, hardware, hl.RoutingStats())
    planner = Planner(spec, hardware, placement, Prefetch(), placed)
    program = planner.program(planner.shape("main", StepPlan("prefill", {"a": 4})))
    found = gpu.LayerByLayer(lanes, lambda: lanes.done.append("wait"))
    found.run(program, lambda op: None, 0.0)
    assert spec.moe_layers == (0, 2)
    assert " ".join(lanes.done) == (
        "load 0 embed -1 attention 0 router 0 experts 0 combine 0 wait "
        "load 2 attention 1 mlp 1 wait attention 2 router 2 experts 2 combine 2 wait head 3 wait"
    )


def test_what_was_not_put_in_place_is_not_measured(gpu: ModuleType) -> None:
    names = [one.name for one in gpu.WITHOUT]
    assert not any("," in name for name in names)  # they are given with commas between them
    for part in (gpu.pageable, gpu.synchronised):
        with pytest.raises(RuntimeError, match="there is nothing to measure"), part():
            pass
    assert cuda_device.host_store is host_store


def test_parts_are_replaced_in_the_device(gpu: ModuleType) -> None:
    """On torch's CPU tensors, whose store is not pinned anyway: what is replaced is what the device is made of."""
    checkpoint = hl.open_checkpoint(ORACLE)
    placed = hl.PlacementPlan(hl.Tier.STREAMED, ring_slots=2)
    for part in (gpu.pageable, gpu.synchronised):
        with part():
            device = cuda_device.cuda_device(checkpoint, placed, 2, where="cpu")
        device.close()
        assert isinstance(device.lanes, gpu.LayerByLayer) == (part is gpu.synchronised)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_every_variant_is_measured_on_a_gpu(gpu: ModuleType, tmp_path: Path) -> None:
    words = ["--preset", "tiny", "--tokens", "64,512", "--steps", "2", "--decode", "1,3", "--beside-cpu"]
    gpu.main([str(tmp_path), *words])
    lines = (tmp_path / "slp.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    names = [*gpu.VARIANTS, *(one.name for one in gpu.WITHOUT)]
    assert {(row["variant"], row["tokens"]) for row in rows if row["variant"] != LINK} == {
        (name, tokens) for name in names for tokens in (64, 512)
    }
    assert all(row["mfu"] > 0 for row in rows if row["variant"] != LINK)
    lines = (tmp_path / "decode.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(row["variant"], row["batch"]) for row in map(json.loads, lines)] == [
        (PLAIN, 1), (CPU, 1), (PLAIN, 3), (DUAL, 3), (CPU, 3)
    ]  # fmt: skip
