"""What a loaded model takes of a memory, by purpose, as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybridlab.errors import MemoryBudgetError

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, the budget they must fit, and the KV tokens and tokens of a step that they are enough for.

    `memory` says whose. Beside the host's, `gpu` is the plan of the GPU's; `kv_offloaded`: KV lives in the host's.
    """

    parts: Mapping[str, int]
    budget_bytes: int
    kv_tokens: int
    token_budget: int
    memory: str = "memory"
    gpu: MemoryPlan | None = None
    kv_offloaded: bool = field(default=False, kw_only=True)

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    def require_room(self, advice: str) -> None:
        """Raises `MemoryBudgetError` with needed, there, the plan and `advice`, if the parts do not fit."""
        if self.total_bytes > self.budget_bytes:
            needed, there = self.shown(self.total_bytes), self.shown(self.budget_bytes)
            raise MemoryBudgetError(f"{needed} of {self.memory} needed, {there} in the budget ({self}); {advice}")

    def shown(self, num_bytes: int) -> str:
        """`num_bytes` in the unit that suits the budget."""
        unit, name = self._unit
        return f"{num_bytes / unit:.2f} {name}"

    def __str__(self) -> str:
        unit, named = self._unit
        items = ", ".join(f"{name} {size / unit:.2f}" for name, size in self.parts.items())
        total = f"total {self.total_bytes / unit:.2f} of {self.budget_bytes / unit:.2f}"
        sizes = f"steps of {self.token_budget} tokens, KV for {self.kv_tokens}"
        return f"{self.memory} plan ({named}): {items}; {total}; {sizes}"

    @property
    def _unit(self) -> tuple[int, str]:
        return (GIB, "GiB") if self.budget_bytes >= GIB else (2**20, "MiB")

    def _repr_html_(self) -> str:
        sizes = (*self.parts.items(), ("total", self.total_bytes), ("budget", self.budget_bytes))
        right = "<td style='text-align:right'>"
        rows = "".join(f"<tr><td>{name}</td>{right}{size / GIB:.3f}</td></tr>" for name, size in sizes)
        table = f"<table><tr><th>{self.memory}</th><th>GiB</th></tr>{rows}</table>"
        if self.gpu is not None:
            return table + self.gpu._repr_html_()
        return f"{table}steps of {self.token_budget} tokens, KV for {self.kv_tokens}"


@dataclass(frozen=True)
class Peak:
    """The most that torch has had of a GPU's memory since a model was loaded: in tensors, and taken from the driver.

    Beside a plan: neither has the CUDA context, which the plan counts; what is taken has gaps between tensors as well.
    """

    allocated_bytes: int
    reserved_bytes: int

    def __str__(self) -> str:
        tensors, taken = self.allocated_bytes / GIB, self.reserved_bytes / GIB
        return f"GPU memory at its peak (GiB): {tensors:.2f} in tensors, {taken:.2f} taken"


@dataclass(frozen=True)
class Needs:
    """What one memory must hold: `fixed` bytes by purpose, and more with each token of a step and of KV.

    A token of a step adds `token_bytes` to the purpose `step`, one of KV adds `kv_bytes` to `kv`.
    """

    memory: str
    budget_bytes: int
    fixed: Mapping[str, int]
    token_bytes: int
    kv_bytes: int
    step: str
    kv: str = "KV cache"

    def parts(self, token_budget: int, kv_tokens: int) -> dict[str, int]:
        """Bytes by purpose; purposes that take nothing are left out."""
        grown = {self.step: token_budget * self.token_bytes, self.kv: kv_tokens * self.kv_bytes}
        names = dict.fromkeys((*self.fixed, *grown))
        found = {name: self.fixed.get(name, 0) + grown.get(name, 0) for name in names}
        return {name: size for name, size in found.items() if size}

    @property
    def free_bytes(self) -> int:
        """What the fixed parts leave of the budget; below 0 if they do not fit."""
        return self.budget_bytes - sum(self.fixed.values())

    def plan(self, token_budget: int, kv_tokens: int) -> MemoryPlan:
        return MemoryPlan(self.parts(token_budget, kv_tokens), self.budget_bytes, kv_tokens, token_budget, self.memory)
