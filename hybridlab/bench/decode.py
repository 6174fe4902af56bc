"""Benchmarks of the engine against the floor of this machine, measured in the same run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from hybridlab import kernels
from hybridlab.batch import Entry, StepBatch
from hybridlab.device_lock import alone
from hybridlab.engine.worker import WORKER
from hybridlab.errors import ConfigError
from hybridlab.loading import load
from hybridlab.model.weight_layout import WeightLayout, check_weight_layout
from hybridlab.plans import StepPlan
from hybridlab.request import Sampling
from hybridlab.session import Engine


@dataclass(frozen=True)
class DecodeBench:
    """Decode steps of `batch` requests at `depth` tokens of context; medians over `steps` steps.

    `bytes_per_step` counts the stored bytes of each tensor that the step needs once (experts: those routed to),
    plus the KV cache that it reads. `read_gb_s` is the median of a plain read loop over a buffer far beyond
    L3, run between the steps. `fraction` is the median over steps of step rate / rate of the read loop beside it.
    `python_share` is 1 - time inside compiled calls / step time.
    """

    model: str
    batch: int
    depth: int
    steps: int
    threads: int
    tier: str
    weight_layout: str
    tokens_per_s: float
    step_s: float
    bytes_per_step: float
    gb_s: float
    read_gb_s: float
    read_gb_s_min: float
    read_gb_s_max: float
    fraction: float
    python_share: float
    evidence: str = "measured"

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_per_step / self.batch

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_per_token": self.bytes_per_token}

    def __str__(self) -> str:
        return "\n".join(
            (
                f"decode of {self.model}, batch {self.batch}, depth {self.depth}: medians of {self.steps} steps, "
                f"{self.threads} threads, tier {self.tier}, weights in {self.weight_layout} ({self.evidence})",
                f"  tokens/s            {self.tokens_per_s:8.2f}   ({self.step_s * 1e3:.2f} ms a step)",
                f"  bytes per token     {self.bytes_per_token / 1e9:8.3f} GB",
                f"  weights and KV      {self.gb_s:8.1f} GB/s",
                f"  read loop           {self.read_gb_s:8.1f} GB/s   "
                f"({self.read_gb_s_min:.1f} to {self.read_gb_s_max:.1f})",
                f"  fraction of it      {self.fraction:8.2f}",
                f"  Python's share      {self.python_share:8.2f}",
            )
        )

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"


def decode(
    preset: str = "qwen3-7b-a1b",
    *,
    checkpoint: str | Path | None = None,
    layers: int | None = None,
    dtype: str = "fp8",
    depth: int = 0,
    batch: int = 1,
    threads: int | None = None,
    weight_layout: WeightLayout = "rows",
    steps: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> DecodeBench:
    """Time decode steps of a checkpoint, or of a random one of `preset` written to a temporary folder.

    The context of `depth` tokens is random KV data, since prefilling it would take longer than the benchmark;
    the tokens are those that the model draws. Raises `ConfigError` on impossible numbers.
    """
    for name, value, least in (("depth", depth, 0), ("batch", batch, 1), ("steps", steps, 1)):
        if value < least:
            raise ConfigError(f"{name} is {value}, expected at least {least}")
    room = {"kv_tokens": batch * (depth + steps + 32), "token_budget": max(batch, 64)}
    made = {"layers": layers, "dtype": dtype, "seed": seed}
    with opened(preset, checkpoint, made, progress, threads=threads, weight_layout=weight_layout, **room) as engine:
        return _time_decode(engine, weight_layout, depth, batch, steps, seed, progress)


@contextmanager
def opened(
    preset: str,
    checkpoint: str | Path | None,
    made: Mapping[str, Any],
    progress: bool,
    *,
    weight_layout: WeightLayout,
    **options: Any,
) -> Iterator[Engine]:
    """An engine alone on the CPU: of `checkpoint`, or of `preset` written with the options `made` for the while.

    `options` go to `hl.load`. Raises `ConfigError` for an unknown layout before anything is written.
    """
    check_weight_layout(weight_layout)
    with (
        made_checkpoint(preset, checkpoint, made, progress) as folder,
        alone("cpu"),  # as every measured run: beside another one it would time both
        load(folder, weight_layout=weight_layout, **options) as engine,
    ):
        yield engine


@contextmanager
def made_checkpoint(
    preset: str, checkpoint: str | Path | None, made: Mapping[str, Any], progress: bool
) -> Iterator[Path]:
    """The folder `checkpoint`, or a random one of `preset`, written with the options `made` for the while."""
    if checkpoint is not None:
        yield Path(checkpoint)
        return
    from hybridlab.checkpoint.writer import make_checkpoint

    with TemporaryDirectory(prefix="hybridlab-bench-") as scratch:
        folder = Path(scratch) / preset
        make_checkpoint(folder, preset, progress=progress, **made)
        yield folder


def step_bytes(engine: Engine, experts_used: list[set[int]], batch: int, context_tokens: int) -> int:
    """Stored bytes that a decode step must read: dense tensors once, each routed expert once, `batch` KV contexts."""
    spec, checkpoint = engine.spec, engine.checkpoint
    expert_bytes = sum(len(used) for used in experts_used) * spec.expert_bytes
    dense = checkpoint.num_bytes - len(spec.moe_layers) * spec.num_experts * spec.expert_bytes
    if not spec.tie_embeddings:
        dense -= checkpoint.tensor("model.embed_tokens.weight").nbytes  # one row a token: not worth counting
    kv_bytes = spec.kv_elements_per_token * 2
    return dense + expert_bytes + batch * context_tokens * kv_bytes


def _time_decode(
    engine: Engine, weight_layout: str, depth: int, batch: int, steps: int, seed: int, progress: bool
) -> DecodeBench:
    from tqdm.auto import trange

    probe = np.random.default_rng(seed).integers(0, 256, 2**28, dtype=np.uint8)
    times, rates, fractions, bytes_read, native = [], [], [], [], []
    stepper = _decode_steps(engine, depth, batch, seed)
    for _ in range(3):  # warm-up: page faults, thread pools, first-touch
        next(stepper)
        kernels.read_bandwidth_bytes(probe, engine.threads)
    for _ in trange(steps, desc="decode", disable=not progress):
        before = _read_rate(probe, engine.threads)
        native_before = kernels.native_seconds()
        start = perf_counter()
        experts_used, context = next(stepper)
        elapsed = perf_counter() - start
        native.append(kernels.native_seconds() - native_before)
        after = _read_rate(probe, engine.threads)
        size = step_bytes(engine, experts_used, batch, context)
        times.append(elapsed)
        rates += [before, after]
        bytes_read.append(size)
        fractions.append(size / elapsed / ((before + after) / 2))
    step_s = median(times)
    return DecodeBench(
        model=engine.checkpoint.folder.name,
        batch=batch,
        depth=depth,
        steps=steps,
        threads=engine.threads,
        tier=kernels.tier(),
        weight_layout=weight_layout,
        tokens_per_s=batch / step_s,
        step_s=step_s,
        bytes_per_step=median(bytes_read),
        gb_s=median(b / t for b, t in zip(bytes_read, times, strict=True)) / 1e9,
        read_gb_s=median(rates) / 1e9,
        read_gb_s_min=min(rates) / 1e9,
        read_gb_s_max=max(rates) / 1e9,
        fraction=median(fractions),
        python_share=1 - sum(native) / sum(times),
    )


def _decode_steps(engine: Engine, depth: int, batch: int, seed: int) -> Iterator[tuple[list[set[int]], int]]:
    """Endless decode steps; each yields the experts that every MoE layer used and the context it read."""
    runtime = engine.lone_runtime
    runtime.wait_mapped()
    runtime.randomise_cache(seed)
    rng = np.random.default_rng(seed)
    last = [int(token) for token in rng.integers(0, engine.spec.vocab, batch)]
    per_request = runtime.num_kv_blocks // batch
    tables = [tuple(range(i * per_request, (i + 1) * per_request)) for i in range(batch)]
    step = StepPlan("decode", {str(i): 1 for i in range(batch)})
    program = engine.planner.program(engine.planner.shape(WORKER, step))
    for context in range(depth, per_request * runtime.kv_block_tokens):
        entries = (Entry(str(i), (last[i],), context, tables[i], Sampling(), wants_token=True) for i in range(batch))
        used: dict[int, set[int]] = defaultdict(set)
        batch_now = StepBatch(WORKER, step, tuple(entries))

        def count(layer: int, _: object, expert_ids: np.ndarray, used: dict[int, set[int]] = used) -> None:
            used[layer].update(expert_ids.ravel().tolist())

        tokens = runtime.step(program, batch_now, count)
        last = [tokens[str(i)] for i in range(batch)]
        yield list(used.values()), context + 1


def _read_rate(buffer: np.ndarray, threads: int) -> float:
    start = perf_counter()
    kernels.read_bandwidth_bytes(buffer, threads)
    return buffer.nbytes / (perf_counter() - start)
