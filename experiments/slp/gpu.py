"""Stream-loading prefill and hybrid decode on one GPU, each measurement written into `OUT` as it is made.

`python experiments/slp/gpu.py OUT [--preset qwen3-30b-a3b] [--tokens 16384,32768] [--steps 3]` makes a random
checkpoint in a temporary folder and runs `bench prefill` on it, whose variants say what overlap is worth, and three
more that leave out a part of the engine: pageable instead of pinned memory, a synchronisation behind each layer, and
both. Rows go to `OUT`/slp.jsonl. `--decode 1,2,4,6,8` then runs `bench decode` (`OUT`/decode.jsonl). On a machine
without a GPU, `--device emulated` runs the same without those three (`--preset tiny --tokens 512`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import hybridlab as hl
from hybridlab.bench.decode_devices import decode
from hybridlab.bench.prefill_devices import RING, VARIANTS, Variant, prefill
from hybridlab.checkpoint.writer import make_checkpoint
from hybridlab.engine import cuda_device
from hybridlab.engine.devices import Device
from hybridlab.engine.host_store import HostStore
from hybridlab.engine.lanes import Lanes
from hybridlab.engine.shared_blocks import host_store
from hybridlab.plans import Op, Program, Span


@dataclass(frozen=True)
class LayerByLayer:
    """Lanes whose host waits for the device behind each layer; a layer's load is enqueued ahead of the layer before.

    That is double buffering as it is often written: the device is never a layer ahead of the host. The ring has to hold
    two layers.
    """

    lanes: Lanes
    wait: Callable[[], None]

    def run(self, program: Program, execute: Callable[[Op], None], clock_start_s: float) -> Sequence[Span]:
        order = sorted(program.order, key=lambda op: (_stage(op), op.kind != "load"))
        stages = [_stage(op) for op in order]
        ends = {op.id for op, one, two in zip(order, stages, [*stages[1:], None], strict=True) if one != two}

        def step(op: Op) -> None:
            execute(op)
            if op.id in ends:
                self.wait()

        return self.lanes.run(replace(program, order=tuple(order)), step, clock_start_s)


def _stage(op: Op) -> int:
    return max(0, op.layer - (op.kind == "load"))


@contextmanager
def pageable() -> Iterator[None]:
    """The host's experts in memory that the driver does not know: it copies them twice."""
    made = []

    def store(*given: Any, pin: bool, **options: Any) -> HostStore:
        made.append(host_store(*given, pin=False, **options))
        return made[-1]

    with patch.object(cuda_device, "host_store", store):
        yield
    _require(made)


@contextmanager
def synchronised() -> Iterator[None]:
    """A device whose lanes are `LayerByLayer`."""
    made, build = [], cuda_device.cuda_device

    def device(*given: Any, **options: Any) -> Device:
        made.append(build(*given, **options))
        return replace(made[-1], lanes=LayerByLayer(made[-1].lanes, torch.cuda.synchronize))

    with patch.object(cuda_device, "cuda_device", device):
        yield
    _require(made)


def _require(made: Sequence[object]) -> None:
    if not made:
        raise RuntimeError(
            "the engine was not made from what this script put in its place: there is nothing to measure"
        )


def without(*parts: Callable[[], Any]) -> Callable[..., hl.Engine]:
    """`hl.load` with `parts` of the engine replaced, the worker in this process, where they are."""

    def load(*given: Any, **options: Any) -> hl.Engine:
        with ExitStack() as held:
            for part in parts:
                held.enter_context(part())
            return hl.load(*given, **options, worker="thread")

    return load


WITHOUT = (
    Variant("ring in pageable memory", RING, make=without(pageable)),
    Variant("ring with a wait behind each layer", RING, make=without(synchronised)),
    Variant("pageable with a wait behind each layer", RING, make=without(pageable, synchronised)),
)


def main(words: Sequence[str] | None = None) -> None:
    known = {**VARIANTS, **{one.name: one for one in WITHOUT}}
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", default="16384,32768")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--vram-gb", type=float)
    parser.add_argument("--variants", help="with commas; none for decode alone; default: all", default="")
    parser.add_argument("--decode", help="numbers of requests, with commas: 1,2,4,6,8", default="")
    parser.add_argument("--depth", type=int, default=1024)
    parser.add_argument("--beside-cpu", action="store_true")
    given = parser.parse_args(words)
    names = [name.strip() for name in given.variants.split(",") if name.strip()]
    if unknown := [name for name in names if name not in (*known, "none")]:
        parser.error(f"--variants: unknown {unknown[0]!r}, expected some of {', '.join(known)}")
    if not names:
        names = [*VARIANTS] if given.device == "emulated" else [*known]
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.checkpoint or Path(scratch) / given.preset
        if not folder.exists():
            make_checkpoint(folder, given.preset, progress=True)
        common: dict[str, Any] = {"device": given.device, "checkpoint": folder, "out": given.out}
        if names != ["none"]:
            variants = [known[name] for name in names]
            room: dict[str, Any] = {"vram_gb": given.vram_gb, "variants": variants, "steps": given.steps}
            print(prefill(**common, **room, tokens=_numbers(given.tokens)), file=sys.stderr)
        if given.decode:
            asked = {"depth": given.depth, "beside_cpu": given.beside_cpu, "vram_gb": given.vram_gb}
            print(decode(**common, **asked, batch=_numbers(given.decode)), file=sys.stderr)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
