"""How many tokens a step may have and the KV cache holds, so that host and GPU hold all; before anything is allocated.

What is not given is chosen: on a GPU the largest step that there is room for, so that a prompt is one step and its
experts cross the link once. KV lives on the GPU unless that would leave a step of less than `LEAST_STEP` tokens; then
it is offloaded to the host's memory, a layer at a time on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hybridlab.engine.cuda_memory import RESIDENT, beside_others, gpu_needs
from hybridlab.engine.host_needs import OFFLOADED, PINNED, host_needs, host_needs_beside_gpu
from hybridlab.engine.memory import GIB, MemoryPlan, Needs
from hybridlab.engine.ring import slots_bytes
from hybridlab.errors import MemoryBudgetError
from hybridlab.model.numerics import WIDE_CACHE_BYTES, Exact, Numerics
from hybridlab.plans import PlacementPlan
from hybridlab.spec import HardwareSpec, ModelSpec

CPU_STEP = 2048
"""Tokens of a step on device "cpu", unless given: more are not computed faster, and decoding waits for them."""
LEAST_STEP = 2048
DEFAULT_KV_TOKENS = 32768
_ROUND = 256


def plan_load(
    model: ModelSpec,
    placed: PlacementPlan,
    hardware: HardwareSpec,
    numerics: Numerics,
    *,
    weight_bytes: int,
    threads: int,
    token_budget: int | None,
    kv_tokens: int | None,
    kv_block_tokens: int,
    memory_gb: float | None = None,
    free_bytes: int | None = None,
    pinnable_bytes: int | None = None,
    shared: bool = False,
    pays: bool | None = None,
    weight_layout: str = "rows",
    precision: str = "bf16",
) -> MemoryPlan:
    """The plan of the host's memory, with that of the GPU's where there is one; `numerics` are the host's.

    `memory_gb` (GiB) replaces what the machine has, `free_bytes` is what of it (and of its cgroup's) nobody uses now,
    where it will be pinned; no more than `pinnable_bytes` are. `shared`: experts lie in memory of several processes;
    `pays` (None: nobody does): so do this process' weights on the GPU, which its share of that counts or not. A
    `kv_tokens` of None takes `DEFAULT_KV_TOKENS` or what there is room for, but at least one step's tokens; it is
    rounded up to blocks. Raises `MemoryBudgetError` with needed, there and what to lower.
    """
    budget_bytes = hardware.host_memory_bytes if memory_gb is None else int(memory_gb * GIB)
    if memory_gb is None and free_bytes is not None:
        budget_bytes = min(budget_bytes, free_bytes)
    kv_token_bytes = model.kv_elements_per_token * numerics.kv_dtype.itemsize

    def needs(offloaded: bool) -> list[Needs]:
        """Of the GPU, where there is one, and of the host."""
        if hardware.device == "cuda":
            host = host_needs_beside_gpu(
                model,
                placed,
                budget_bytes=budget_bytes,
                kv_token_bytes=kv_token_bytes if offloaded else 0,
                shared=shared,
            )
            vram = hardware.gpu_memory_bytes
            gpu = gpu_needs(model, placed, budget_bytes=vram, kv_offloaded=offloaded, precision=precision)
            return [gpu if pays is None else beside_others(gpu, placed, pays=pays), host]
        precision_bytes = numerics.workspace_bytes(model, threads)
        if hardware.device == "emulated" and isinstance(numerics, Exact):
            precision_bytes += WIDE_CACHE_BYTES  # each side keeps its own
        host = host_needs(
            model,
            weight_bytes=weight_bytes,
            budget_bytes=budget_bytes,
            kv_token_bytes=kv_token_bytes,
            precision_bytes=precision_bytes,
            weight_layout=weight_layout,
            ring_bytes=slots_bytes(placed, model),
        )
        if hardware.device == "cpu":
            return [host]
        gpu = gpu_needs(
            model,
            placed,
            budget_bytes=min(hardware.gpu_memory_bytes, budget_bytes),  # it is the host's memory
            kv_element_bytes=numerics.kv_dtype.itemsize,
            context_bytes=0,
            nccl_bytes=0,
            captures=False,
        )
        return [gpu, host]

    if hardware.device == "cpu" and token_budget is None:
        token_budget = CPU_STEP
    found = []
    for offloaded in (False, True) if hardware.device == "cuda" else (False,):
        there = needs(offloaded)
        found.append((offloaded, there, _sizes(there, model, token_budget, kv_tokens, kv_block_tokens)))
    good = [choice for choice in found if _fits(choice[1], *choice[2])]
    least = min(LEAST_STEP, model.max_positions, kv_tokens or LEAST_STEP)
    roomy = [choice for choice in good if token_budget is not None or choice[2][0] >= least]
    if good:
        offloaded, there, sizes = roomy[0] if roomy else max(good, key=lambda choice: choice[2][0])
    else:
        offloaded, there, sizes = found[-1]
    plans = [each.plan(*sizes) for each in there]
    more = "raise memory_gb" if memory_gb is not None else "free memory" if free_bytes is not None else None
    for plan, each in zip(plans, there, strict=True):
        plan.require_room(_advice(plan, each, more))
    if hardware.device == "cuda":
        _require_pinnable(plans[-1], free_bytes, "free (of the machine's memory, or its cgroup's)", "free memory")
        _require_pinnable(plans[-1], pinnable_bytes, "allowed by the memlock limit", "raise that (ulimit -l)")
    return replace(plans[-1], gpu=plans[0] if len(plans) > 1 else None, kv_offloaded=offloaded)


def _sizes(
    needs: Sequence[Needs], model: ModelSpec, token_budget: int | None, kv_tokens: int | None, block: int
) -> tuple[int, int]:
    """(tokens of a step, of KV): what is given, the largest step, then KV; at least 1, whether they fit or not."""
    most_kv = min(DEFAULT_KV_TOKENS, 4 * model.max_positions)
    if token_budget is None:
        cap = min(model.max_positions, kv_tokens or model.max_positions)
        least = min(LEAST_STEP, cap)
        step = _step(needs, most_kv if kv_tokens is None else _blocks(kv_tokens, block))
        if kv_tokens is None and not least <= step <= most_kv:
            # KV holds a whole step: more of it for a long one, less where memory is short.
            both = min(_quotient(n.free_bytes - block * n.kv_bytes, n.token_bytes + n.kv_bytes) for n in needs)
            step = both if step > most_kv else max(step, min(least, both))
        step = min(step, cap)
        token_budget = max(1, step if step < _ROUND or step == cap else step // _ROUND * _ROUND)
    if kv_tokens is None:
        room = min(_quotient(n.free_bytes - token_budget * n.token_bytes, n.kv_bytes) for n in needs)
        kv_tokens = max(token_budget, min(max(most_kv, token_budget), room // block * block))
    return token_budget, _blocks(kv_tokens, block)


def _step(needs: Sequence[Needs], kv_tokens: int) -> int:
    return min(_quotient(n.free_bytes - kv_tokens * n.kv_bytes, n.token_bytes) for n in needs)


def _quotient(room: int, each: int) -> int:
    return max(0, room) // each if each else 2**62


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _fits(needs: Sequence[Needs], token_budget: int, kv_tokens: int) -> bool:
    return all(sum(n.parts(token_budget, kv_tokens).values()) <= n.budget_bytes for n in needs)


def _require_pinnable(plan: MemoryPlan, there: int | None, limit: str, more: str) -> None:
    """Pages that are pinned cannot be swapped out or shared: what `memory_gb` says makes no more of them."""
    parts = {name: plan.parts[name] for name in (PINNED, OFFLOADED) if name in plan.parts}
    needed = sum(parts.values())
    if there is not None and needed > there:
        items = ", ".join(f"{name} {plan.shown(size)}" for name, size in parts.items())
        lower = f", or lower kv_tokens ({plan.kv_tokens})" if OFFLOADED in parts else ""
        raise MemoryBudgetError(
            f"{plan.shown(needed)} of pinned memory needed ({items}), {plan.shown(there)} {limit}; take a placement "
            f"with more experts on the GPU for good{lower}, or {more}"
        )


def _advice(plan: MemoryPlan, needs: Needs, more: str | None) -> str:
    """What to lower, the sizes that it has now in brackets; `more` is how to have more of the host's memory."""
    weights = sum(size for name, size in needs.fixed.items() if name.startswith(("weights", "experts")))
    can = [] if more is None else [more]
    if needs.memory == "GPU memory":
        can = ["raise vram_gb"]
    elif weights > needs.budget_bytes:
        can.append(f"take a smaller checkpoint (the weights alone take {plan.shown(weights)})")
    if "ring" in plan.parts:
        can.append("lower the placement's ring_slots or raise its parts_per_layer")
    if any(part.startswith(RESIDENT) for part in plan.parts):
        can.append("take a placement with fewer resident experts (a lower gpu_gb, or 'streamed')")
    if needs.free_bytes > 0 or not can:
        can.append(f"lower kv_tokens ({plan.kv_tokens}) or token_budget ({plan.token_budget})")
    return ", or ".join(reversed(can))
