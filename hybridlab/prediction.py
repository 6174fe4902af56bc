"""How long a run will take, before it starts: extrapolated from stored runs where there are any, else estimated.

A run ends when the last request has come and all work is done, so its length is the larger of the two. The work is
that of the largest batch that can form. Everything here is `extrapolated`, nothing measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from hybridlab.spec import ModelSpec
from hybridlab.workload.base import Row, WorkloadBase

if TYPE_CHECKING:
    import pandas as pd

EVIDENCE = "extrapolated"
STEP_S = 1e-3
"""What a step takes beside weights and arithmetic: Python, hand-offs, small operations. Assumed."""
PREFILL_GFLOP_S_PER_CORE: Mapping[str, float] = {"avx512_vbmi_bf16": 80.0, "avx2": 25.0, "numpy": 2.0}
"""Arithmetic of long prompts, per kernel tier. Assumed, from single prefills on virtual machines of two cores."""
EXACT_SLOWDOWN = 20.0
"""How much longer `precision="exact"` takes: float64, weights widened. Assumed."""


@dataclass(frozen=True)
class Load:
    """What a workload asks for. `prompt_tokens` are those to compute: found prefixes are not.

    `concurrency` is how many requests can be there at once. `earliest_s` is when the last request arrives if every
    answer takes no time; `is_closed` says that requests wait for others.
    """

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    mean_context_tokens: float
    last_prompt_tokens: int
    last_output_tokens: int
    concurrency: int
    earliest_s: float
    is_closed: bool


def load_of(workload: WorkloadBase, rows: Sequence[Row], *, prefix_cache: bool) -> Load:
    """Add up `rows` (of `load_rows`) with lengths scaled and clipped.

    With `prefix_cache`, earlier turns of a conversation and blocks that an earlier row had first are not computed
    again, as if the cache held everything.
    """
    prompt_total, output_total, context_total = 0, 0, 0.0
    earliest_s: list[float] = []
    contexts: list[int] = []
    seen: set[int] = set()
    last_s, last = -inf, (0, 0)
    for row in rows:
        prompt, output = workload.lengths(row)
        before = contexts[row.after] if row.continues and row.after is not None else 0
        computed = prompt if prefix_cache else before + prompt
        if prefix_cache and row.blocks:
            known = next((n for n, block in enumerate(row.blocks) if block not in seen), len(row.blocks))
            computed = max(1, prompt - (workload.prompt_end(known * row.block_tokens) if known else 0))
            seen.update(row.blocks)
        contexts.append(before + prompt + output)
        earliest_s.append(row.arrival_s + (0.0 if row.after is None else earliest_s[row.after]))
        prompt_total += computed
        output_total += output
        context_total += (before + prompt + output / 2) * output
        if earliest_s[-1] >= last_s:
            last_s, last = earliest_s[-1], (computed, output)
    roots = sum(row.after is None for row in rows)
    return Load(
        num_requests=len(rows),
        prompt_tokens=prompt_total,
        output_tokens=output_total,
        mean_context_tokens=context_total / output_total,
        last_prompt_tokens=last[0],
        last_output_tokens=last[1],
        concurrency=roots,
        earliest_s=last_s,
        is_closed=roots < len(rows),
    )


@dataclass(frozen=True)
class ModelCost:
    """Bytes that a decode step reads and operations of a prompt token, from the shapes of a model."""

    spec: ModelSpec
    weight_bytes: int
    kv_element_bytes: int = 2

    def step_bytes(self, batch: float, context_tokens: float) -> float:
        """Stored bytes of a decode step of `batch` requests: dense tensors once, each expert that is routed to once
        (independent uniform routes), and every request's KV entries."""
        spec = self.spec
        experts = len(spec.moe_layers) * spec.num_experts * spec.expert_bytes
        embedding = 0 if spec.tie_embeddings else 2 * spec.vocab * spec.hidden  # a row a token
        touched = 1 - (1 - spec.top_k / spec.num_experts) ** batch
        kv_bytes = batch * context_tokens * spec.kv_elements_per_token * self.kv_element_bytes
        return self.weight_bytes - experts - embedding + touched * experts + kv_bytes

    @property
    def prompt_flop_per_token(self) -> float:
        """Two operations per weight that a prompt token meets; attention scores and the head are left out."""
        spec = self.spec
        attention = spec.num_layers * 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim * spec.hidden
        experts = len(spec.moe_layers) * spec.top_k * 3 * spec.moe_intermediate * spec.hidden
        dense = len(spec.dense_layers) * 3 * spec.dense_intermediate * spec.hidden
        return 2.0 * (attention + experts + dense)


@dataclass(frozen=True)
class Rates:
    """How fast a machine works. `scale` is how much longer stored runs took than the other numbers say."""

    read_gb_s: float
    prefill_gflop_s: float
    scale: float = 1.0
    source: str = "estimated"

    def work_s(
        self, model: ModelCost, prompt_tokens: float, output_tokens: float, batch: float, context: float
    ) -> float:
        """Seconds to compute so many tokens, decoding `batch` requests at a time at a mean `context` (tokens)."""
        batch = max(batch, 1.0)
        prefill_s = prompt_tokens * model.prompt_flop_per_token / (self.prefill_gflop_s * 1e9)
        step_s = STEP_S + model.step_bytes(batch, context) / (self.read_gb_s * 1e9)
        return self.scale * (prefill_s + output_tokens / batch * step_s)


def estimated_rates(read_gb_s: float, tier: str, num_cores: int, precision: str) -> Rates:
    """Rates without any stored run: the host's read bandwidth, and operations assumed per kernel tier."""
    slower = EXACT_SLOWDOWN if precision == "exact" else 1.0
    per_core = PREFILL_GFLOP_S_PER_CORE.get(tier, min(PREFILL_GFLOP_S_PER_CORE.values()))
    return Rates(read_gb_s / slower, num_cores * per_core / slower)


def calibrated(rates: Rates, model: ModelCost, runs: Sequence[pd.DataFrame]) -> Rates:
    """`rates` scaled to what the requests of stored `runs` (same model, engine and machine) took."""
    busy_s = estimate_s = 0.0
    used = 0
    for requests in runs:
        busy = busy_of(requests)
        if busy is None:
            continue
        used += 1
        busy_s += busy.busy_s
        estimate_s += rates.work_s(model, busy.prompt_tokens, busy.output_tokens, busy.batch, busy.context_tokens)
    if not used:
        return rates
    return replace(rates, scale=busy_s / estimate_s, source=f"from {used} stored run{'' if used == 1 else 's'}")


_USED = ("first_scheduled_s", "first_token_s", "finished_s", "prompt_tokens", "cached_tokens", "output_tokens")


@dataclass(frozen=True)
class Busy:
    """What a stored run computed, and the time in which it had anything to compute."""

    busy_s: float
    prompt_tokens: int
    output_tokens: int
    batch: float
    """Mean number of requests that decode while any does."""
    context_tokens: float


def busy_of(requests: pd.DataFrame) -> Busy | None:
    """None if no request of the run was computed. Times when nobody was served do not count as busy."""
    done = requests.dropna(subset=["first_scheduled_s", "first_token_s", "finished_s"])
    column = {name: done[name].to_numpy(float) for name in done.columns if name in _USED}
    outputs, prompts = column["output_tokens"], column["prompt_tokens"]
    if outputs.sum() == 0:
        return None
    started, first, ended = (column[name] for name in ("first_scheduled_s", "first_token_s", "finished_s"))
    decoding_s = _union_s(first.tolist(), ended.tolist())
    return Busy(
        busy_s=_union_s(started.tolist(), ended.tolist()),
        prompt_tokens=round(prompts.sum() - column["cached_tokens"].sum()),
        output_tokens=round(outputs.sum()),
        batch=float((ended - first).sum()) / decoding_s if decoding_s > 0 else 1.0,
        context_tokens=float(((prompts + outputs / 2) * outputs).sum() / outputs.sum()),
    )


def _union_s(starts: Sequence[float], ends: Sequence[float]) -> float:
    total, reached = 0.0, -inf
    for start, end in sorted(zip(starts, ends, strict=True)):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass(frozen=True)
class Prediction:
    """Seconds of one run. `arrival_span_s` is None where requests wait for others."""

    arrival_span_s: float | None
    work_s: float
    predicted_s: float


def predict(load: Load, model: ModelCost, rates: Rates, *, kv_tokens: int) -> Prediction:
    """The larger of the time until the last request is answered, were it alone, and the work."""
    room = kv_tokens / max(load.mean_context_tokens, 1.0)
    batch = min(load.concurrency, room)
    work_s = rates.work_s(model, load.prompt_tokens, load.output_tokens, batch, load.mean_context_tokens)
    last_s = rates.work_s(model, load.last_prompt_tokens, load.last_output_tokens, 1, load.mean_context_tokens)
    predicted_s = max(load.earliest_s + last_s, work_s)
    return Prediction(None if load.is_closed else load.earliest_s, work_s, predicted_s)
