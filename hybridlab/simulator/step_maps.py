"""Whole-prefill and decode-step times over arrays of machines, models and step sizes: `StepMap`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from hybridlab.errors import ConfigError, HybridlabError, MemoryBudgetError
from hybridlab.plans import LaneKind, Program
from hybridlab.routing import RoutingStats
from hybridlab.simulator.cost_model import Micro, cost_model, dram_bytes_s, handoffs_s
from hybridlab.simulator.jax_setup import float64_on_cpu, import_jax
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.programs import tabulate
from hybridlab.simulator.room import needed_bytes
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import ModelShape
from hybridlab.simulator.vector_clock import event_clock, queued, scan_clock, scanned
from hybridlab.spec import ModelSpec

CHUNK = 4096
"""Configurations computed at once: bounds the memory, and keeps what one op needs of them in the caches."""


@dataclass(frozen=True, eq=False)
class StepMap:
    """Seconds of a step of `program`, for `model` with experts chosen as `routing` says (None: each alike).

    What decides which ops there are (placement, ring slots, paths, microbatches, ranks: the topology) is the
    program's, and compiled once; every number beside it may be an array.
    """

    program: Program
    model: ModelSpec
    routing: RoutingStats | None = None

    def __call__(self, machine: Machine, shape: ModelShape, micros: Sequence[Micro]) -> np.ndarray:
        """Seconds of each configuration, float64 [N].

        Any field of `machine`, `shape` and `micros` (one for each microbatch) may be an array [N] instead of a float.
        Raises `ConfigError` naming a parameter that is out of its range, `MemoryBudgetError` for a model that the
        machine has no memory for, naming the configuration; nothing that is not finite is returned.
        """
        given, count = self._checked(machine, shape, micros)
        chunk = min(CHUNK, 1 << (count - 1).bit_length())
        found = np.empty(count)
        with float64_on_cpu():
            for start in range(0, count, chunk):
                part = [values[start : start + chunk] for values in given]
                missing = chunk - len(part[0])
                found[start : start + chunk] = self._compiled(
                    [np.concatenate([values, np.repeat(values[-1:], missing)]) for values in part]
                )[: chunk - missing]
        if not np.isfinite(found).all():
            where = int(np.flatnonzero(~np.isfinite(found))[0])
            raise HybridlabError(f"step map: configuration {where} has no finite time")
        return found

    def fits(self, machine: Machine, shape: ModelShape, kv_tokens: Any = 0) -> np.ndarray:
        """Whether each configuration's machine has the memory, bool [N] (or [1] without arrays)."""
        host, gpu = self._needed(shape, kv_tokens)
        there = np.asarray(host <= machine.host_memory_gb * 1e9) & np.asarray(gpu <= machine.gpu_memory_gb * 1e9)
        return np.atleast_1d(there)

    @property
    def on_gpu(self) -> bool:
        return self.program.shape.compute_lane is LaneKind.GPU

    @cached_property
    def table(self) -> Any:
        return tabulate(self.program, Routes(self.model, self.routing))

    def sensitivity(self, machine: Machine, shape: ModelShape, micros: Sequence[Micro]) -> dict[str, float]:
        """By parameter of the machine, how many percent longer the step takes if it is one percent larger.

        Of one configuration, which may not have arrays; raises as a call does. Where an op is bound by two things
        alike, the mean of both sides is given.
        """
        given, count = self._checked(machine, shape, micros)
        if count != 1:
            raise ConfigError(f"step map: {count} configurations given, a sensitivity is of one")
        jax = import_jax()
        names = [each.name for each in fields(Machine)]
        with float64_on_cpu():
            point = jax.numpy.concatenate(given[: len(names)])
            others = given[len(names) :]

            def seconds(point: Any) -> Any:
                return self._seconds([*point[:, None], *others])[0]

            found = jax.jit(lambda at: (jax.jacfwd(seconds)(at), seconds(at)))(point)
            slope, step_s = np.asarray(found[0]), float(found[1])
        values = np.concatenate(given[: len(names)])
        return dict(zip(names, (slope * values / step_s).tolist(), strict=True))

    @cached_property
    def _compiled(self) -> Any:
        """[values [B] of every field] -> seconds [B]."""
        compiled = import_jax().jit(self._seconds)
        return lambda values: np.asarray(compiled(values))

    @cached_property
    def _seconds(self) -> Any:
        """The same, not compiled."""
        jax = import_jax()
        table, shares = self.table, self.table.shares
        arrays, num_classes = queued(table) if shares else scanned(table)
        clock = event_clock() if shares else scan_clock()
        num_machine, num_shape = len(fields(Machine)), len(fields(ModelShape))
        num_micros = self.program.shape.num_microbatches

        def costs(values: Sequence[Any]) -> Any:
            machine = Machine(*values[:num_machine])
            shape = ModelShape(*values[num_machine : num_machine + num_shape])
            rest = values[num_machine + num_shape :]
            micros = [Micro(*rest[4 * i : 4 * i + 4]) for i in range(num_micros)]
            cost = cost_model(machine, shape, micros, jax.numpy)
            found = [cost(one) for one in table.classes]
            padding = [0.0] * (num_classes - len(found))
            alone = jax.numpy.stack([*(c.alone_s for c in found), *padding])
            dram = jax.numpy.stack([*(c.dram_bytes for c in found), *padding])
            return alone, dram, jax.numpy.stack(handoffs_s(machine)), dram_bytes_s(machine)[1]

        def seconds(values: Sequence[Any]) -> Any:
            here = {name: jax.numpy.asarray(array) for name, array in arrays.items()}
            alone_CB, dram_CB, hand_4B, total_B = jax.vmap(costs, out_axes=(1, 1, 1, 0))(values)
            if shares:
                return clock(here, alone_CB, hand_4B, dram_CB, total_B)
            return clock(here, alone_CB, hand_4B)

        return seconds

    def _needed(self, shape: ModelShape, kv_tokens: Any) -> tuple[Any, Any]:
        return needed_bytes(self.model, shape, self.program.shape.placement, gpu=self.on_gpu, kv_tokens=kv_tokens)

    def _checked(self, machine: Machine, shape: ModelShape, micros: Sequence[Micro]) -> tuple[list[np.ndarray], int]:
        """Every field as float64 [N], by name checked, and N."""
        if self.on_gpu and np.any(np.asarray(machine.gpu_dram_bytes, float) > 0):
            raise ConfigError("step map: gpu_dram_bytes is above 0; expected a GPU with a memory of its own, not cores")
        wanted = self.program.shape.num_microbatches
        if len(micros) != wanted:
            raise ConfigError(f"step map: {len(micros)} microbatches given, the program has {wanted}")
        named = [(f"machine.{f.name}", getattr(machine, f.name), f.metadata) for f in fields(machine)]
        named += [(f"shape.{f.name}", getattr(shape, f.name), {}) for f in fields(shape)]
        named += [(f"micros[{i}].{f.name}", getattr(m, f.name), {}) for i, m in enumerate(micros) for f in fields(m)]
        count, found = 1, []
        for name, given, about in named:
            try:
                values = np.asarray(given, np.float64)
            except (TypeError, ValueError):
                raise ConfigError(f"step map: {name} is {given!r:.60}, expected numbers") from None
            if values.ndim > 1 or (values.ndim == 1 and len(values) not in (1, count) and count > 1) or not values.size:
                raise ConfigError(f"step map: {name} has shape {list(values.shape)}, expected one number or [{count}]")
            count = max(count, values.size)
            least = about.get("least", 0.0)
            if self.on_gpu and name.removeprefix("machine.") in ("gpu_read_gb_s", "gpu_tflops", "link_gb_s"):
                about = {**about, "above": True}
            most = about.get("most", math.inf)
            wrong = ~(np.isfinite(values) & ((values > least) if about.get("above") else (values >= least)))
            wrong |= values > most
            if wrong.any():
                bound = f"{'above' if about.get('above') else 'of at least'} {least:g}"
                bound += f" and at most {most:g}" if most < math.inf else ""
                raise ConfigError(f"step map: {name} is {values[wrong].flat[0]}, expected finite numbers {bound}")
            found.append(np.atleast_1d(values))
        fits = self.fits(machine, shape)
        if not fits.all():
            where = int(np.flatnonzero(~fits)[0])
            raise MemoryBudgetError(
                f"step map: the model does not fit the memory of {int((~fits).sum())} of {len(fits)} configurations, "
                f"the first is {where}; StepMap.fits tells which"
            )
        return [np.broadcast_to(values, count) for values in found], count
