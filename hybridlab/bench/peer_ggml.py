"""The CPU kernels of ggml (llama.cpp) by way of ggml-python, for `bench kernels`."""

from __future__ import annotations

import ctypes
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from hybridlab.bench.contenders import Calls
from hybridlab.bench.shapes import MatrixShape
from hybridlab.bench.weights import ALIGN_BYTES, WeightPool, aligned
from hybridlab.number_formats import bf16_to_float32

MOST_ROWS = 64
# A quantised block: 32 weights and their FP16 scale.
Q8_0_BLOCK, Q8_0_BLOCK_BYTES = 32, 34


class GgmlMatrices:
    """`ggml_mul_mat` with weights in "q8_0" or "bf16": one graph per matrix, one pool of threads for all."""

    layout = "rows"
    layout_bytes = 0
    settle_s = 0.02
    """The threads poll for that long at least."""

    def __init__(self, shape: MatrixShape, pool: WeightPool, weights: str) -> None:
        import ggml  # pyright: ignore[reportMissingImports]

        self._ggml: Any = ggml
        self._shape = shape
        self.name, self.weights = f"ggml_{weights}", weights
        self.tier = f"ggml-python {version('ggml-python')}"
        if weights == "bf16":
            self.weight_bytes = shape.n * shape.k * 2
            self._data = [pool.bf16(shape.n, shape.k) for _ in range(pool.count(self.weight_bytes))]
        else:
            self.weight_bytes = shape.n * shape.k // Q8_0_BLOCK * Q8_0_BLOCK_BYTES
            self._data = [self._quantised(pool) for _ in range(pool.count(self.weight_bytes))]
        self._pools: dict[int, Any] = {}
        self._kept: list[Any] = []

    def takes(self, rows: int) -> bool:
        return rows <= MOST_ROWS

    def calls(self, x: np.ndarray, threads: int) -> Calls:
        ggml = self._ggml
        self._release()
        self._pools[threads] = ggml.ggml_threadpool_new(ctypes.byref(ggml.ggml_threadpool_params_default(threads)))
        return [self._call(data, x, threads) for data in self._data]

    def _call(self, data: np.ndarray, x: np.ndarray, threads: int) -> Any:
        ggml, shape = self._ggml, self._shape
        kind = ggml.GGML_TYPE_BF16 if self.weights == "bf16" else ggml.GGML_TYPE_Q8_0
        size = 8 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
        context = ggml.ggml_init(ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True))
        weight = ggml.ggml_new_tensor_2d(context, kind, shape.k, shape.n)
        inputs = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, shape.k, len(x))
        product = ggml.ggml_mul_mat(context, weight, inputs)
        out = aligned(4 * shape.n * len(x) + ALIGN_BYTES)
        for tensor, array in ((weight, data), (inputs, x), (product, out)):
            tensor.contents.data = array.__array_interface__["data"][0]
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, product)
        plan = ggml.ggml_graph_plan(graph, threads, self._pools[threads])
        work = aligned(plan.work_size + ALIGN_BYTES)
        plan.work_data = ctypes.cast(work.__array_interface__["data"][0], type(plan.work_data))
        self._kept.append((context, x, out, work, plan))
        return partial(ggml.ggml_graph_compute, graph, ctypes.byref(plan))

    def _quantised(self, pool: WeightPool) -> np.ndarray:
        """One matrix as ggml itself quantises it: uint8 [bytes]."""
        values = bf16_to_float32(pool.bf16(self._shape.n, self._shape.k))
        out = aligned(self.weight_bytes + ALIGN_BYTES)
        address = ctypes.cast(values.ctypes.data, ctypes.POINTER(ctypes.c_float))
        self._ggml.ggml_quantize_chunk(
            self._ggml.GGML_TYPE_Q8_0, address, out.ctypes.data, 0, self._shape.n, self._shape.k, None
        )
        return out

    def _release(self) -> None:
        for context, *_ in self._kept:
            self._ggml.ggml_free(context)
        for threads in self._pools.values():
            self._ggml.ggml_threadpool_free(threads)
        self._kept.clear()
        self._pools.clear()

    def close(self) -> None:
        """End the threads and free the graphs."""
        self._release()
