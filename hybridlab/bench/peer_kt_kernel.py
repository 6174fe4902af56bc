"""The FP8 expert kernels of KTransformers (kt-kernel), for `bench kernels`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from hybridlab.bench.contenders import Calls, routings
from hybridlab.bench.shapes import LayerShape
from hybridlab.bench.weights import WeightPool
from hybridlab.spec import BLOCK_FP8

MOST_ROWS = 64


class KtLayer:
    """`AMXFP8_MOE` of kt-kernel (the name holds without AMX, too) over block FP8 weights, which it copies."""

    name = "kt_kernel"
    weights = "fp8"
    layout = "own"
    settle_s = 0.1
    """Its threads spin for 50 ms after a call."""

    def __init__(self, layer: LayerShape, pool: WeightPool, threads: int) -> None:
        with _stdout_away():
            import kt_kernel  # pyright: ignore[reportMissingImports]
            import torch

            self._torch = torch
            extension: Any = kt_kernel.kt_kernel_ext
            self.tier = f"kt-kernel {version('kt-kernel')} {kt_kernel.__cpu_variant__}"
            self._layer = layer
            self.weight_bytes = self.layout_bytes = layer.expert_bytes(1)
            self._experts = max(layer.top_k, pool.count(self.weight_bytes))
            h, i = layer.hidden, layer.intermediate
            sides = [[pool.fp8(*shape) for _ in range(self._experts)] for shape in ((i, h), (i, h), (h, i))]
            workers = extension.WorkerPoolConfig()
            workers.subpool_count, workers.subpool_numa_map, workers.subpool_thread_count = 1, [0], [threads]
            self._cpu = extension.CPUInfer(workers)
            self._mask = torch.zeros(self._experts, dtype=torch.bool)  # none of them on a GPU
            config = extension.moe.MOEConfig(self._experts, layer.top_k, h, i, self._mask.data_ptr())
            config.layer_idx, config.pool, config.max_len = 0, self._cpu.backend_, MOST_ROWS
            config.quant_config.bits, config.quant_config.group_size = 8, BLOCK_FP8
            config.quant_config.zero_point = False
            for name, side in zip(("gate", "up", "down"), sides, strict=True):
                setattr(config, f"{name}_projs", [[_address(weight) for weight, _ in side]])
                setattr(config, f"{name}_scales", [[_address(scale) for _, scale in side]])
            self._moe = extension.moe.AMXFP8_MOE(config)
            order = torch.arange(self._experts, dtype=torch.int64)
            self._cpu.submit(self._moe.load_weights_task(order.data_ptr()))
            self._cpu.sync()

    def takes(self, rows: int) -> bool:
        return rows <= MOST_ROWS

    def calls(self, x: np.ndarray, threads: int) -> Calls:
        torch = self._torch
        inputs = torch.from_numpy(x).to(torch.bfloat16)
        out, rows = torch.empty_like(inputs), torch.tensor([len(x)], dtype=torch.int32)
        routes = routings(len(x), self._experts, self._layer.top_k)
        return [
            partial(self._step, rows, torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(weights), inputs, out)
            for ids, weights in routes
        ]

    def _step(self, rows: Any, ids: Any, weights: Any, x: Any, out: Any) -> Any:
        pointers = (tensor.data_ptr() for tensor in (ids, weights, x, out))
        self._cpu.submit(self._moe.forward_task(rows.data_ptr(), self._layer.top_k, *pointers, False))
        self._cpu.sync()
        return out

    def close(self) -> None:
        """End its threads and free its copy of the weights."""
        with _stdout_away():
            del self._moe, self._cpu


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@contextmanager
def _stdout_away() -> Iterator[None]:
    """Its C++ code greets on the process's stdout, where only a result may stand."""
    sys.stdout.flush()
    kept = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C has buffered would come out later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
