"""What a machine does with a model in the fastest way that its memory allows, and what more of each part would save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from hybridlab.errors import ConfigError, MemoryBudgetError
from hybridlab.lowering import bind_slots, lower
from hybridlab.plans import ExpertPath, LaneKind, PlacementPlan, Program, Role, Shape, Tier
from hybridlab.simulator.clock import Dram, run_program
from hybridlab.simulator.cost_model import Micro, cost_model, dram_bytes_s, handoffs_s
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape
from hybridlab.simulator.step_maps import StepMap
from hybridlab.spec import ModelSpec
from hybridlab.strategies.fields import MOST_PARTS
from hybridlab.validation import validate

UPGRADES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "twice the DRAM channels": {"host_peak_gb_s": 2.0},
        "twice the CPU cores": {"cpu_cores": 2.0, "cpu_tflops": 2.0},
        "twice the link": {"link_gb_s": 2.0},
        "twice the VRAM": {"gpu_memory_gb": 2.0},
        "twice the VRAM's rate": {"gpu_read_gb_s": 2.0},
        "twice the GPU's FLOP/s": {"gpu_tflops": 2.0},
    }
)
"""What one could buy: by what factor it changes which parameters of a `Machine`."""
ROW = {"evidence": "simulated"}


@dataclass(frozen=True, eq=False)
class Way:
    """A way to compute a step, by name: where experts are, and with what program."""

    name: str
    program: Program


def ways(machine: Machine, spec: ModelSpec, shape: ModelShape, *, role: Role, kv_tokens: int) -> list[Way]:
    """The ways that the machine's memory allows for a step of `role` "prefill" or "decode", with room for `kv_tokens`.

    Experts on the CPU; and for prompts, experts streamed through a ring of two slots, of whole layers or the largest
    parts that fit. Either way those of as many layers as the VRAM still holds stay there. Of one GPU. Raises
    MemoryBudgetError if none fits, ConfigError naming a parameter of the machine that is out of its range.
    """
    machine.check()
    experts, others = shape.weight_bytes(spec)
    kept = others + kv_tokens * spec.num_layers * shape.kv_bytes
    host, vram = machine.host_memory_gb * 1e9, machine.gpu_memory_gb * 1e9
    if not machine.has_gpu:
        if experts + kept > host:
            raise MemoryBudgetError(f"{(experts + kept) / 1e9:.1f} GB of host memory needed, {host / 1e9:.1f} GB there")
        return [Way("all on the CPU", _program(spec, PlacementPlan(), role, gpu=False))]
    if kept > vram:
        raise MemoryBudgetError(f"{kept / 1e9:.1f} GB of VRAM needed beside the experts, {vram / 1e9:.1f} GB there")
    found, num_layers = [], len(spec.moe_layers)
    layer = experts / num_layers

    def way(name: str, tier: Tier, ring_bytes: float, ring_slots: int = 0, parts: int = 1) -> None:
        on_gpu = min(num_layers, int((vram - kept - ring_bytes) / layer))
        if experts - on_gpu * layer > host:
            return
        spread = [spec.moe_layers[i * num_layers // on_gpu] for i in range(on_gpu)]  # else the link would idle at first
        tiers = {(each, expert): Tier.RESIDENT for each in spread for expert in range(spec.num_experts)}
        placed = PlacementPlan(tier, tiers, ring_slots=ring_slots, parts_per_layer=parts)
        found.append(Way("experts on the GPU" if on_gpu == num_layers else name, _program(spec, placed, role)))

    way("experts on the CPU", Tier.HOST, 0.0)
    rings = [(n, 2 * layer / n) for n in range(1, MOST_PARTS + 1) if kept + 2 * layer / n <= vram]
    if role == "prefill" and rings and kept + experts > vram:
        parts, ring_bytes = rings[0]
        way("experts streamed", Tier.STREAMED, ring_bytes, 2, parts)
    if not found:
        raise MemoryBudgetError(f"{experts / 1e9:.1f} GB of experts, {host / 1e9:.1f} GB of host memory there")
    return found


def _program(spec: ModelSpec, placed: PlacementPlan, role: Role, *, gpu: bool = True) -> Program:
    lane = LaneKind.GPU if gpu else LaneKind.CPU
    what = Shape(role, "main", lane, ExpertPath(), 1, (0,), placed)
    ops = bind_slots(lower(what, spec), placed.ring_slots)
    return Program(what, ops, validate(ops, ring_slots=placed.ring_slots, ranks=(0,)))


def way_s(way: Way, machine: Machine, spec: ModelSpec, shape: ModelShape, micro: Micro) -> float:
    """Seconds of a step."""
    cost = cost_model(machine, shape, [micro])
    spans = run_program(way.program, Routes(spec), cost, handoffs_s(machine), Dram(*dram_bytes_s(machine)))
    return float(max(span.end_s for span in spans))


def prefill_rows(
    machine: Machine, spec: ModelSpec, shape: ModelShape, prompt_tokens: Sequence[int]
) -> list[dict[str, Any]]:
    """One row for each length of a prompt and each way to prefill it: way, ttft_s (no queue), tokens_per_s."""
    rows = []
    for tokens in prompt_tokens:
        _from_one(prompt_tokens=tokens)
        for way in ways(machine, spec, shape, role="prefill", kv_tokens=tokens):
            seconds = way_s(way, machine, spec, shape, Micro.prefill(float(tokens)))
            rows.append({"way": way.name, "prompt_tokens": tokens, "ttft_s": seconds, "tokens_per_s": tokens / seconds})
    return [row | ROW for row in rows]


def decode_rows(
    machine: Machine, spec: ModelSpec, shape: ModelShape, num_requests: Sequence[int], context_tokens: int
) -> list[dict[str, Any]]:
    """One row for each number of requests that decode together behind `context_tokens` tokens: tpot_s, tokens_per_s."""
    rows = []
    for count in num_requests:
        way, seconds = _decode(machine, spec, shape, count, context_tokens)
        rows.append({"num_requests": count, "way": way.name, "tpot_s": seconds, "tokens_per_s": count / seconds})
    return [row | ROW for row in rows]


def upgrade_rows(
    machine: Machine,
    spec: ModelSpec,
    shape: ModelShape,
    *,
    prompt_tokens: int,
    context_tokens: int,
    upgrades: Mapping[str, Mapping[str, float]] = UPGRADES,
) -> list[dict[str, Any]]:
    """TTFT of a prompt and TPOT of one request, each in its fastest way: as the machine is, and with each upgrade.

    `ttft_saved` and `tpot_saved` are shares of the machine's own time. An upgrade is {parameter: factor}; those of a
    GPU are left out where there is none. Raises ConfigError for a parameter that a machine does not have.
    """
    rows = []
    for change, factors in {"as it is": {}, **upgrades}.items():
        if unknown := [name for name in factors if not hasattr(machine, name)]:
            raise ConfigError(f"upgrade {change!r}: a machine has no parameter {unknown[0]!r}")
        if factors and not any(getattr(machine, name) for name in factors):
            continue
        other = replace(machine, **{name: getattr(machine, name) * by for name, by in factors.items()})
        ttft_way, ttft_s = _prefill(other, spec, shape, prompt_tokens)
        _, tpot_s = _decode(other, spec, shape, 1, context_tokens)
        rows.append({"change": change, "ttft_s": ttft_s, "tpot_s": tpot_s, "prefill_way": ttft_way.name} | ROW)
    own = rows[0]
    return [
        row | {f"{name}_saved": 1 - row[f"{name}_s"] / own[f"{name}_s"] for name in ("ttft", "tpot")} for row in rows
    ]


def machine_rows(
    machines: Mapping[str, Machine], spec: ModelSpec, shape: ModelShape, *, prompt_tokens: int, context_tokens: int
) -> list[dict[str, Any]]:
    """One row for each machine: TTFT of a prompt, in which way, and tokens/s of one request; or why it cannot."""
    rows: list[dict[str, Any]] = []
    for name, machine in machines.items():
        try:
            way, ttft_s = _prefill(machine, spec, shape, prompt_tokens)
            _, tpot_s = _decode(machine, spec, shape, 1, context_tokens)
        except MemoryBudgetError as error:
            rows.append({"machine": name, "prefill_way": f"does not fit: {error}"} | ROW)
            continue
        found = {"ttft_s": ttft_s, "tpot_s": tpot_s, "tokens_per_s": 1 / tpot_s}
        rows.append({"machine": name, "prefill_way": way.name} | found | ROW)
    return rows


def sensitivity_rows(
    machine: Machine,
    spec: ModelSpec,
    shape: ModelShape,
    *,
    prompt_tokens: int,
    context_tokens: int,
    least: float = 0.005,
) -> list[dict[str, Any]]:
    """By parameter: how many percent longer TTFT and TPOT become if it is one percent larger, by derivatives (jax).

    In the fastest way of the machine as it is, which a larger VRAM would change: see `upgrade_rows`. Parameters of
    which neither is `least` in size are left out; the largest come first.
    """
    ttft_way, _ = _prefill(machine, spec, shape, prompt_tokens)
    tpot_way, _ = _decode(machine, spec, shape, 1, context_tokens)
    micros = Micro.prefill(float(prompt_tokens)), Micro.decode(1.0, float(context_tokens))
    ttft, tpot = (
        StepMap(way.program, spec).sensitivity(machine, shape, [micro])
        for way, micro in zip((ttft_way, tpot_way), micros, strict=True)
    )
    size = {name: max(abs(ttft[name]), abs(tpot[name])) for name in ttft}
    names = sorted((name for name in ttft if size[name] >= least), key=lambda name: -size[name])
    return [{"parameter": name, "ttft": ttft[name], "tpot": tpot[name]} | ROW for name in names]


def _from_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected a whole number from 1")


def _prefill(machine: Machine, spec: ModelSpec, shape: ModelShape, tokens: int) -> tuple[Way, float]:
    _from_one(prompt_tokens=tokens)
    return _fastest(machine, spec, shape, Micro.prefill(float(tokens)), "prefill", tokens)


def _decode(machine: Machine, spec: ModelSpec, shape: ModelShape, count: int, context: int) -> tuple[Way, float]:
    _from_one(num_requests=count, context_tokens=context)
    return _fastest(machine, spec, shape, Micro.decode(float(count), float(context)), "decode", count * context)


def _fastest(
    machine: Machine, spec: ModelSpec, shape: ModelShape, micro: Micro, role: Role, kv_tokens: int
) -> tuple[Way, float]:
    found = [
        (way, way_s(way, machine, spec, shape, micro))
        for way in ways(machine, spec, shape, role=role, kv_tokens=kv_tokens)
    ]
    return min(found, key=lambda each: each[1])
