"""Seconds and DRAM bytes of every op kind: one set of formulas, for Python floats and for arrays of JAX alike.

An op takes a fixed time (launches, a copy's latency) and the longer of what its bytes and its FLOPs take, with what of
the shorter one does not hide behind it (`overlap` 1: a roofline). Beyond `narrow_tokens` tokens, kernels read a weight
at `wide_read` of the rate: the batch curve; for experts, whose tokens scatter, this sets in from half to one and a half
times as many tokens an expert.
Routing is known in expectation: an expert that a token chooses with probability q is read with probability 1 - (1 -
q)^T by T tokens, and computes q T of them. On the mixed path, an expert that arrived runs on the GPU if it can expect
`min_tokens` tokens, else on the CPU.

Shared experts run in the "combine" op, since no op of a program is theirs: they never hide behind the CPU's experts.
Activations count where their bytes may matter: the sums of "combine", collectives, and the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from hybridlab.errors import PlanError
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.shapes import ModelShape

Number = Any
"""A float, or an array of JAX."""

FLOATS = SimpleNamespace(maximum=max, minimum=min, where=np.where)
"""The functions that differ between floats and JAX; `jax.numpy` has them under these names."""


@dataclass(frozen=True)
class Micro:
    """What a microbatch computes: its new `tokens`, their query-key `pairs` in one layer, the `context` tokens whose
    keys and values are read, and the `rows` whose logits are wanted."""

    tokens: Number
    pairs: Number
    context: Number
    rows: Number

    def shared(self, ranks: int) -> Micro:
        """What one of `ranks` computes of it; the context is on all of them."""
        return Micro(self.tokens / ranks, self.pairs / ranks, self.context, self.rows / ranks)

    @classmethod
    def of(cls, counts: Sequence[tuple[int, int, bool]]) -> Micro:
        """From (new tokens, tokens before them, wants a token) of each request."""
        tokens = pairs = context = rows = 0
        for n, before, wants in counts:
            tokens += n
            pairs += n * before + n * (n + 1) // 2
            context += n + before
            rows += wants
        return cls(float(tokens), float(pairs), float(context), float(rows))

    @classmethod
    def decode(cls, num_requests: Number, context_tokens: Number) -> Micro:
        """Of requests that decode one token each behind `context_tokens` tokens."""
        pairs = num_requests * (context_tokens + 1)
        return cls(num_requests, pairs, pairs, num_requests)

    @classmethod
    def prefill(cls, prompt_tokens: Number) -> Micro:
        """Of one whole prompt."""
        return cls(prompt_tokens, prompt_tokens * (prompt_tokens + 1) / 2, prompt_tokens, 1.0)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Experts of an op, those that are chosen alike counted together.

    `share` float64 [U]: the probability that a token chooses one of them; `count` float64 [U]: how many there are.
    `least` float64 [U]: tokens that one must expect for the GPU to compute it (0: wherever it is), of which the op of
    the `host` takes the rest.
    """

    share: np.ndarray
    count: np.ndarray
    least: np.ndarray
    host: bool
    _known: dict[float, tuple[float, float]] = field(default_factory=dict, repr=False)

    def of(self, tokens: Number, xp: Any) -> tuple[Number, Number]:
        """(distinct experts, routed tokens) that `tokens` tokens bring to the op, as expected."""
        if xp is not FLOATS:
            return self._count(tokens, xp)
        if (found := self._known.get(tokens)) is None:  # steps of as many tokens come again and again
            distinct, routed = self._count(tokens, xp)
            found = self._known[tokens] = float(distinct), float(routed)
        return found

    def _count(self, tokens: Number, xp: Any) -> tuple[Number, Number]:
        expected = tokens * self.share
        runs = xp.where((self.least == 0) | ((expected < self.least) == self.host), self.count, 0.0)
        return (runs * (1.0 - (1.0 - self.share) ** tokens)).sum(), (runs * expected).sum()


@dataclass(frozen=True, eq=False)
class OpClass:
    """Ops that take the same time in one step. `num_experts` are those of a load.

    A step of several `ranks` shares its tokens out to them, evenly: an op computes its rank's own unless it computes
    `all_tokens` (experts; the router of exchange "small_ep"). A collective sends each own token as `rows` rows.
    """

    kind: str
    on_cpu: bool
    microbatch: int
    num_experts: int = 0
    chosen: Chosen | None = None
    ranks: int = 1
    rows: float = 0.0
    all_tokens: bool = True


@dataclass(frozen=True)
class Cost:
    """Seconds that an op takes alone, and bytes of host DRAM that it moves meanwhile."""

    alone_s: Number
    dram_bytes: Number


Costs = Callable[[OpClass], Cost]


@dataclass(frozen=True)
class _Compute:
    """What computes: the host's CPU lane, or a GPU. Rates as ops reach them; `dram_bytes` of the host's per byte."""

    bytes_s: Number
    flop_s: Number
    dense_flop_s: Number
    attention_flop_s: Number
    overlap: Number
    narrow_tokens: Number
    wide_read: Number
    wide_expert_read: Number
    op_us: Number
    expert_us: Number
    expert_bytes: Number
    dram_bytes: Number


def _cpu(m: Machine) -> _Compute:
    flop_s = m.cpu_tflops * m.cpu_flop_efficiency * 1e12
    return _Compute(
        bytes_s=m.host_peak_gb_s * m.host_read_efficiency * 1e9,
        flop_s=flop_s,
        dense_flop_s=flop_s * m.cpu_dense_flop_ratio,
        attention_flop_s=flop_s * m.cpu_attention_flop_ratio,
        overlap=m.cpu_overlap,
        narrow_tokens=m.cpu_narrow_tokens,
        wide_read=m.cpu_wide_read,
        wide_expert_read=m.cpu_wide_expert_read,
        op_us=m.cpu_op_us,
        expert_us=m.cpu_expert_us,
        expert_bytes=1.0,
        dram_bytes=1.0,
    )


def _gpu(m: Machine) -> _Compute:
    flop_s = m.gpu_tflops * m.gpu_flop_efficiency * 1e12
    return _Compute(
        bytes_s=m.gpu_read_gb_s * m.gpu_read_efficiency * 1e9,
        flop_s=flop_s,
        dense_flop_s=flop_s * m.gpu_dense_flop_ratio,
        attention_flop_s=m.gpu_tflops * m.gpu_attention_efficiency * 1e12,
        overlap=m.gpu_overlap,
        narrow_tokens=m.gpu_narrow_tokens,
        wide_read=m.gpu_wide_read,
        wide_expert_read=m.gpu_wide_expert_read,
        op_us=m.gpu_op_us,
        expert_us=0.0,
        expert_bytes=m.gpu_expert_bytes,
        dram_bytes=m.gpu_dram_bytes,
    )


def cost_model(machine: Machine, shape: ModelShape, micros: Sequence[Micro], xp: Any = FLOATS) -> Costs:
    """The cost of each class of ops for microbatches `micros`. Raises `PlanError` for an op kind that is unknown."""
    m, s = machine, shape
    dense_bytes, expert_bytes = s.dense_bits / 8, s.expert_weights * s.expert_bits / 8
    rows = sum(each.rows for each in micros)  # of the head, which is one op for all microbatches
    cpu, gpu = _cpu(m), _gpu(m)

    def busy(where: _Compute, read_s: Number, flop_s: Number) -> Number:
        return xp.maximum(read_s, flop_s) + (1.0 - where.overlap) * xp.minimum(read_s, flop_s)

    def dense(on_cpu: bool, num_bytes: Number, weights: Number, tokens: Number) -> Cost:
        """`num_bytes` hold `weights` weights, each multiplied with `tokens` tokens."""
        where = cpu if on_cpu else gpu
        wide = xp.minimum(1.0, xp.maximum(0.0, tokens - where.narrow_tokens))
        read_s = num_bytes / where.bytes_s * (1.0 + wide * (1.0 / where.wide_read - 1.0))
        busy_s = busy(where, read_s, 2 * tokens * weights / where.dense_flop_s)
        return Cost(where.op_us * 1e-6 + busy_s, num_bytes * where.dram_bytes)

    def attention(one: OpClass, micro: Micro) -> Cost:
        cost = attend(one, micro)
        if one.ranks == 1:
            return cost
        sent = micro.tokens * s.kv_bytes * (one.ranks - 1)  # every rank keeps the keys and values of all tokens
        return Cost(cost.alone_s + m.net_latency_us * 1e-6 + sent / (m.net_gb_s * 1e9), cost.dram_bytes)

    def attend(one: OpClass, micro: Micro) -> Cost:
        """Projections, then scores and values: kernels of their own, each with its own bound."""
        where = cpu if one.on_cpu else gpu
        weights = dense(one.on_cpu, s.attention_weights * dense_bytes, s.attention_weights, micro.tokens)
        earlier = 2 * (micro.context - micro.tokens) * s.expand_weights  # new tokens: among attention_weights
        flop = xp.minimum(micro.pairs * s.pair_flop, micro.pairs * s.pair_flop_expanded + earlier)
        cache_bytes = micro.context * s.kv_bytes
        busy_s = busy(where, cache_bytes / where.bytes_s, flop / where.attention_flop_s)
        return Cost(weights.alone_s + busy_s, weights.dram_bytes + cache_bytes * where.dram_bytes)

    def experts(one: OpClass, micro: Micro) -> Cost:
        assert one.chosen is not None
        distinct, routed = one.chosen.of(micro.tokens, xp)
        where = cpu if one.on_cpu else gpu
        num_bytes = distinct * expert_bytes * where.expert_bytes
        each = routed / xp.maximum(distinct, 1e-9)
        wide = xp.minimum(1.0, xp.maximum(0.0, each / where.narrow_tokens - 0.5))
        read_s = num_bytes / where.bytes_s * (1.0 + wide * (1.0 / where.wide_expert_read - 1.0))
        busy_s = busy(where, read_s, 2 * routed * s.expert_weights / where.flop_s)
        return Cost((where.op_us + distinct * where.expert_us) * 1e-6 + busy_s, num_bytes * where.dram_bytes)

    def load(one: OpClass, micro: Micro) -> Cost:
        num_bytes = one.num_experts * expert_bytes
        return Cost(m.link_latency_us * 1e-6 + num_bytes / (m.link_gb_s * 1e9), num_bytes * m.link_dram_bytes)

    def combine(one: OpClass, micro: Micro) -> Cost:
        num_bytes = s.shared_weights * dense_bytes + 8 * micro.tokens * s.hidden  # BF16: read three, write one
        return dense(one.on_cpu, num_bytes, s.shared_weights, micro.tokens)

    def collective(one: OpClass, micro: Micro) -> Cost:
        sent = micro.tokens * one.rows * s.hidden * m.wire_bytes
        return Cost(m.net_latency_us * 1e-6 + sent / (m.net_gb_s * 1e9), 0.0)

    def embed(one: OpClass, micro: Micro) -> Cost:
        cost = dense(one.on_cpu, 4 * micro.tokens * s.hidden, 0.0, micro.tokens)
        return Cost(cost.alone_s + m.step_us * 1e-6, cost.dram_bytes)

    def head(one: OpClass, micro: Micro) -> Cost:
        weights = s.vocab * s.hidden
        cost = dense(one.on_cpu, weights * s.head_bits / 8, weights, rows / one.ranks)
        return Cost(cost.alone_s + rows * m.row_us * 1e-6, cost.dram_bytes)

    kinds: dict[str, Callable[[OpClass, Micro], Cost]] = {
        "embed": embed,
        "attention": attention,
        "mlp": lambda one, micro: dense(one.on_cpu, s.mlp_weights * dense_bytes, s.mlp_weights, micro.tokens),
        "router": lambda one, micro: dense(one.on_cpu, s.router_weights * 2, s.router_weights, micro.tokens),
        "experts": experts,
        "load": load,
        "combine": combine,
        "all_gather": collective,
        "dispatch": collective,
        "reduce": collective,
        "head": head,
    }

    # Where cores of the host are the GPU, and copy: what an op holds of them counts as as much of the DRAM, so that
    # ops side by side slow down by what is scarcer. Nothing of that with a real GPU.
    emulated = xp.minimum(1.0, m.gpu_cores)
    core_bytes_s = emulated * dram_bytes_s(m)[1] / (m.cpu_cores + m.gpu_cores)
    copying = xp.minimum(1.0, m.link_gb_s / xp.maximum(m.link_core_gb_s, 1e-9)) * xp.minimum(1.0, m.link_core_gb_s)
    held_bytes_s = {
        "gpu": core_bytes_s * m.gpu_cores, "cpu": core_bytes_s * m.cpu_cores, "link": core_bytes_s * copying,
    }  # fmt: skip

    def cost(one: OpClass) -> Cost:
        if one.kind not in kinds:
            raise PlanError(f"op kind {one.kind!r} is unknown to the cost model, expected one of {', '.join(kinds)}")
        micro = micros[one.microbatch]
        found = kinds[one.kind](one, micro if one.all_tokens else micro.shared(one.ranks))
        held = held_bytes_s["link" if one.kind == "load" else "cpu" if one.on_cpu else "gpu"]
        return Cost(found.alone_s, xp.maximum(found.dram_bytes, found.alone_s * held))

    return cost


def dram_bytes_s(machine: Machine) -> tuple[Number, Number]:
    """What host DRAM gives at most, in bytes per second: to all CPU lanes, and to CPU lanes and links together."""
    cpu = machine.host_peak_gb_s * machine.host_read_efficiency * 1e9
    return cpu, cpu * machine.host_shared_ratio


def handoffs_s(machine: Machine) -> tuple[Number, Number, Number, Number]:
    """Seconds between the end of a need and the start of an op that waited for it, by `programs.HANDOFFS`."""
    us = (0.0, machine.handoff_gpu_to_cpu_us, machine.handoff_cpu_to_gpu_us, machine.handoff_stream_us)
    return tuple(each * 1e-6 for each in us)  # type: ignore[return-value]
