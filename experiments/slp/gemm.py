"""A layer's routed experts on one GPU: FP8 multiplied as it is, against FP8 widened to BF16 and torch's grouped matmul.

`python experiments/slp/gemm.py OUT [--shapes qwen3-30b-a3b,deepseek-v3] [--tokens 512,...,32768]` writes one JSON line
a measurement to `OUT`/gemm.jsonl as it is made. Each token's routes are drawn uniformly over all experts of the model;
of `deepseek-v3` only `--experts` are here, so that most routes are elsewhere, as with a part of a layer in a ring.
Rates count the multiplications of routes that are here. `fraction` is of a dense BF16 product's rate in the same run.
`--device cpu --shapes tiny --tokens 16` runs the twins, to try the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridlab.bench.shapes import LayerShape, layers_of
from hybridlab.checkpoint.reader import LinearWeights
from hybridlab.model.cuda_blocks import widen_blocks
from hybridlab.model.cuda_experts import GroupedExperts, Workspace, block_field, grouped_product, sort_routes
from hybridlab.model.expert_block import ExpertBlock
from hybridlab.model.fp8_experts import CodedGroupedExperts, Fp8GroupedExperts, grouped_kernels
from hybridlab.model.fp8_twin import Scaled

Calls = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default="qwen3-30b-a3b,deepseek-v3")
    parser.add_argument("--tokens", default="512,1024,2048,4096,8192,16384,32768")
    parser.add_argument("--experts", type=int, default=32, help="of deepseek-v3, on the device")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dense", type=int, default=8192, help="rows, columns and depth of the dense product")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    for shape in layers_of(given.shapes.split(",")):
        here = given.experts if shape.model == "deepseek-v3" else shape.experts
        block = _block(shape)
        blocks = _blocks(here, block, device)
        for tokens in map(int, given.tokens.split(",")):
            _measure(given, shape, block, blocks, tokens)


def _measure(
    given: argparse.Namespace, shape: LayerShape, block: ExpertBlock, blocks: torch.Tensor, tokens: int
) -> None:
    device, here = blocks.device, len(blocks)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, shape.hidden, generator=generator, device=device)
    ids = torch.rand(tokens, shape.experts, generator=generator, device=device).topk(shape.top_k).indices
    ids = torch.where(ids < here, ids, -1)
    weights = torch.rand(tokens, shape.top_k, generator=generator, device=device)
    routes_here = int((ids >= 0).sum())
    flop = 2 * 3 * shape.hidden * shape.intermediate * routes_here
    calls = _layer_calls(block, blocks, x, ids, weights)
    reference = calls["widened, grouped_mm"]()
    calls = _working(calls)
    errors = {name: float((call() - reference).norm() / reference.norm()) for name, call in calls.items()}
    del reference
    calls |= _working(_part_calls(block, blocks, x, ids))
    side = torch.randn(given.dense, given.dense, generator=generator, device=device).to(torch.bfloat16)
    calls["dense"] = lambda: side @ side
    seconds = _timed(calls, given.repeats, device)
    dense_flop_s = 2 * given.dense**3 / statistics.median(seconds["dense"])
    for name, times in seconds.items():
        work = {"dense": 2 * given.dense**3, "widen": None, "quantise": None}.get(name, flop)
        rate = work / statistics.median(times) if work else None
        row = {
            "variant": name,
            "shape": shape.model,
            "experts": shape.experts,
            "experts_here": here,
            "tokens": tokens,
            "routes_here": routes_here,
            "seconds": statistics.median(times),
            "seconds_min": min(times),
            "seconds_max": max(times),
            "tflop_s": rate and rate / 1e12,
            "fraction": rate and rate / dense_flop_s,
            "dense": given.dense,
            "error": errors.get(name),
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "evidence": "measured",
        }
        with (given.out / "gemm.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = f"{rate / 1e12:8.1f} TFLOP/s {rate / dense_flop_s:6.3f} of dense" if rate else ""
        print(f"{shape.model} {tokens:6} {name:24} {row['seconds'] * 1e3:9.3f} ms {shown}", flush=True)


def _layer_calls(
    block: ExpertBlock, blocks: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> Calls:
    """From float32 activations and routes to the weighted sum, as the engine calls it."""
    groups = {
        "widened, grouped_mm": GroupedExperts(blocks, block, Workspace(len(blocks), block, blocks.device)),
        "BF16 x FP8 in registers": CodedGroupedExperts(blocks, block),
        "FP8 x FP8": Fp8GroupedExperts(blocks, block),
    }
    return {name: partial(group, x, ids, weights, len(blocks)) for name, group in groups.items()}


def _part_calls(block: ExpertBlock, blocks: torch.Tensor, x: torch.Tensor, ids: torch.Tensor) -> Calls:
    """What they are made of; products without widening, gathering and sorting."""
    gate, up, down = (
        Scaled(block_field(blocks, codes, torch.uint8), block_field(blocks, scale, torch.float32))
        for codes, scale in zip(block.weights, block.scales, strict=True)
    )
    kernels = grouped_kernels(blocks.device)
    routes = sort_routes(ids, torch.arange(len(blocks), device=blocks.device))
    bf16, coded = x.to(torch.bfloat16), kernels.quantise(x)
    hidden_bf16 = torch.randn(ids.numel(), gate.codes.shape[1], device=blocks.device).to(torch.bfloat16)
    hidden = kernels.quantise(hidden_bf16)
    w13 = torch.cat([widen_blocks(*gate), widen_blocks(*up)], 1)
    w2, x_RH = widen_blocks(*down), bf16[routes.tokens_R]
    return {
        "widen": lambda: [widen_blocks(*w) for w in (gate, up, down)],
        "quantise": lambda: kernels.quantise(x),
        "grouped_mm alone": lambda: (
            grouped_product(x_RH, w13, routes.ends_E),
            grouped_product(hidden_bf16, w2, routes.ends_E),
        ),
        "BF16 x FP8 alone": lambda: (
            kernels.hidden(bf16, routes.tokens_R, gate, up, routes.ends_E),
            kernels.product(hidden_bf16, down, routes.ends_E),
        ),
        "FP8 x FP8 alone": lambda: (
            kernels.hidden(coded, routes.tokens_R, gate, up, routes.ends_E),
            kernels.product(hidden, down, routes.ends_E),
        ),
    }


def _working(calls: Calls) -> Calls:
    """Those that can be built and launched: time on a GPU is short, and one that cannot must not end the run."""
    found: Calls = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = call
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error!s:.500}", file=sys.stderr, flush=True)
    return found


def _timed(calls: Calls, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times in turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, device))
    return {name: times[1:] for name, times in seconds.items()}


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(1_000_000)  # the launches are enqueued before the first one runs
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _block(shape: LayerShape) -> ExpertBlock:
    def linear(n: int, k: int) -> LinearWeights:
        return LinearWeights("", np.zeros((n, k), np.uint8), np.zeros((-(-n // 128), -(-k // 128)), np.float32))

    wide, narrow = shape.hidden, shape.intermediate
    return ExpertBlock.of((linear(narrow, wide), linear(narrow, wide), linear(wide, narrow)))


def _blocks(experts: int, block: ExpertBlock, device: torch.device) -> torch.Tensor:
    """uint8 [E, num_bytes]: normal weights of the usual size, 1 / sqrt(K), as codes with scales."""
    generator = torch.Generator(device).manual_seed(1)
    blocks = torch.zeros(experts, block.num_bytes, dtype=torch.uint8, device=device)
    for codes, scale in zip(block.weights, block.scales, strict=True):
        target = block_field(blocks, codes, torch.uint8)
        for expert in target:
            values = torch.randn(expert.shape, generator=generator, device=device) * 100
            expert.copy_(values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
        block_field(blocks, scale, torch.float32).fill_(0.01 / codes[1][1] ** 0.5)
    return blocks


if __name__ == "__main__":
    main()
