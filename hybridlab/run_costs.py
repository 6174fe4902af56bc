"""What each run of a plan takes: memory from the engine's own plan, seconds from stored runs or an estimate."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab import provenance
from hybridlab.device_lock import alone_if_free
from hybridlab.errors import ConfigError, HybridlabError, MemoryBudgetError
from hybridlab.execution import one_line
from hybridlab.jobs import Draft, Job
from hybridlab.plans import PlacementPlan
from hybridlab.prediction import EVIDENCE, Load, ModelCost, Rates, calibrated, estimated_rates, load_of, predict
from hybridlab.routing import RoutingStats
from hybridlab.run_files import read_manifest, read_run
from hybridlab.spec import HardwareSpec, ModelSpec
from hybridlab.workload import load_rows
from hybridlab.workload.base import Row

if TYPE_CHECKING:
    import pandas as pd

    from hybridlab.engine.memory import MemoryPlan

GIB = 2**30
SMALL_STEP = 2048
"""Tokens of a step for which the memory of a run that finds no room is shown."""
ASSUMED_READ_GB_S = 10.0
"""Read bandwidth where it is not measured: stored runs scale it, or another process measures just now."""
MANIFEST_BYTES, BYTES_PER_REQUEST, BYTES_PER_TOKEN, BYTES_PER_LAYER = 10_000, 150, 10, 6_000
"""About what a run takes on disk (layers: of its spans); from runs of the quickstart experiment."""
PROBE_BYTES = 256 << 20
"""Read by the probe: less than `hybridlab doctor` takes, for an estimate, and soon done."""
MOST_RUNS = 20
"""Stored runs that a prediction reads: enough to know the rates of a machine, and soon read."""


class Costs:
    """Costs of drafts; what several of them share is worked out once."""

    def __init__(self, results: Path, jobs: Sequence[Job]) -> None:
        from hybridlab.hardware import detect

        self._hardware = detect()
        self.budget_bytes = self._hardware.host_memory_bytes
        self._histories = _histories(results, {_rates_key(job.identity) for job in jobs})
        self._models: dict[Path, ModelCost] = {}
        self._memory: dict[str, tuple[MemoryPlan, str]] = {}
        self._rates: dict[str, Rates] = {}
        self._loads: dict[str, tuple[Load, Load | None]] = {}

    def weight_bytes(self, draft: Draft) -> int:
        """Bytes of the checkpoint of `draft`, made or not."""
        return self._model(draft).weight_bytes

    def row(self, draft: Draft, job: Job | None) -> dict[str, Any]:
        """The columns of a plan that say what a run takes; `problem` says why it cannot run, "" if it can."""
        model, rates = self._model(draft), self._rates_of(draft, job)
        memory, problem = self._memory_of(draft)
        load, warmup = self._load(draft)
        predicted = predict(load, model, rates, kv_tokens=memory.kv_tokens)
        before_s = predict(warmup, model, rates, kv_tokens=memory.kv_tokens).predicted_s if warmup else 0.0
        disk_bytes = MANIFEST_BYTES + load.num_requests * BYTES_PER_REQUEST + load.output_tokens * BYTES_PER_TOKEN
        disk_bytes += model.spec.num_layers * BYTES_PER_LAYER
        return {
            "num_requests": load.num_requests,
            "prompt_tokens": load.prompt_tokens,
            "output_tokens": load.output_tokens,
            "arrival_span_s": nan if predicted.arrival_span_s is None else predicted.arrival_span_s,
            "work_s": predicted.work_s,
            "predicted_s": before_s + predicted.predicted_s,
            "predicted_from": rates.source,
            "evidence": EVIDENCE,
            "memory_gib": memory.total_bytes / GIB,
            "disk_gib": disk_bytes / GIB,
            "problem": problem,
        }

    def _model(self, draft: Draft) -> ModelCost:
        if draft.checkpoint not in self._models:
            self._models[draft.checkpoint] = ModelCost(*_shapes(draft))
        return self._models[draft.checkpoint]

    def _memory_of(self, draft: Draft) -> tuple[MemoryPlan, str]:
        """The memory plan of the engine on this machine, and why it does not fit ("" if it does)."""
        # Drafts that ask for the same placement share the object.
        key = f"{draft.checkpoint} {draft.config.engine.model_dump_json()} {id(draft.strategies['placement'])}"
        if key not in self._memory:
            engine, model = draft.config.engine, self._model(draft)
            hardware, elsewhere = self._machine(draft)
            placed, misplaced = self._placed(draft, hardware)
            problem = elsewhere or misplaced
            memory_gb, least = engine.memory_gb, engine.kv_tokens
            try:
                found = _memory_plan(draft, model, placed, hardware, memory_gb, engine.token_budget, least), problem
            except MemoryBudgetError as error:
                endless = replace(hardware, gpu_memory_bytes=2**62)
                sizes = engine.token_budget or SMALL_STEP, least or 1
                found = _memory_plan(draft, model, placed, endless, 2.0**32, *sizes), problem or str(error)
            self._memory[key] = found
        return self._memory[key]

    def _machine(self, draft: Draft) -> tuple[HardwareSpec, str]:
        """What `draft` is planned with, and why it cannot run here ("" if it can): without a GPU, "cuda" is planned
        with one of `vram_gb`, or with one that has room for all."""
        from hybridlab.engine.options import check_device, cuda_hardware, emulated_hardware
        from hybridlab.hardware import detect

        engine = draft.config.engine
        if engine.device == "emulated":
            return emulated_hardware(self._hardware, engine.vram_gb, engine.link_gb_s), ""
        if engine.device != "cuda":
            return self._hardware, ""
        try:
            check_device("cuda")
        except ConfigError as error:
            there = 2**62 if engine.vram_gb is None else int(engine.vram_gb * 1e9)
            return replace(self._hardware, device="cuda", gpu_memory_bytes=there), str(error)
        return cuda_hardware(detect(gpu=True), engine.vram_gb), ""

    def _placed(self, draft: Draft, hardware: HardwareSpec) -> tuple[PlacementPlan, str]:
        """Where the placement of `draft` puts experts on this machine, and why that cannot be ("" if it can)."""
        from hybridlab.engine.options import check_placed

        placement = deepcopy(draft.strategies["placement"])
        try:
            placed = placement.place(self._model(draft).spec, hardware, RoutingStats())
            check_placed(placed, type(placement).__name__, hardware.device)
        except HybridlabError as error:
            return PlacementPlan(), str(error)
        except Exception as error:  # a placement of the user's may raise anything
            return PlacementPlan(), one_line(error)
        return placed, ""

    def _rates_of(self, draft: Draft, job: Job | None) -> Rates:
        engine = draft.config.engine
        key = _rates_key(job.identity) if job is not None else engine.model_dump_json()
        if key not in self._rates:
            history = self._histories.get(key, [])
            threads = engine.threads or self._hardware.num_cores
            read_gb_s = ASSUMED_READ_GB_S if history else measured_read_gb_s(threads)
            rates = estimated_rates(read_gb_s, _tier(), threads, engine.precision)
            self._rates[key] = calibrated(rates, self._model(draft), history)
        return self._rates[key]

    def _load(self, draft: Draft) -> tuple[Load, Load | None]:
        """What the run asks for, and its warm-up if there is one."""
        config = draft.config
        key = f"{config.workload.model_dump_json()} {config.warmup_requests} {config.engine.prefix_cache}"
        if key not in self._loads:
            rows = load_rows(config.workload, config.project_dir)
            load = load_of(config.workload, rows, prefix_cache=config.engine.prefix_cache)
            first = [rows[index % len(rows)] for index in range(config.warmup_requests)]
            warmup = [Row(0.0, row.prompt_tokens, row.output_tokens) for row in first]
            self._loads[key] = load, load_of(config.workload, warmup, prefix_cache=False) if warmup else None
        return self._loads[key]


@cache
def measured_read_gb_s(threads: int) -> float:
    """The host's read bandwidth: a short probe, once per process, unless another process measures just now."""
    from hybridlab.hardware import read_bandwidth_gb_s
    from hybridlab.hardware.cores import detect_cores

    buffer_bytes = max(PROBE_BYTES, 2 * (detect_cores().l3_bytes or 0))
    with alone_if_free("cpu") as free:
        if not free:
            return ASSUMED_READ_GB_S
        return read_bandwidth_gb_s(threads, repeats=2, buffer_bytes=buffer_bytes).median_gb_s


def _tier() -> str:
    from hybridlab import kernels

    return kernels.tier()


def _shapes(draft: Draft) -> tuple[ModelSpec, int]:
    """The model and the bytes of its weights; of a preset without looking at the disk."""
    model = draft.config.model
    if model.preset is None:
        from hybridlab.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(draft.checkpoint)
        return checkpoint.spec, checkpoint.num_bytes
    from hybridlab.checkpoint.presets import preset_spec
    from hybridlab.checkpoint.schema import expected_tensors

    spec = preset_spec(model.preset, dtype=model.dtype, layers=model.layers)
    return spec, sum(tensor.num_bytes for tensor in expected_tensors(spec))


def _memory_plan(
    draft: Draft,
    model: ModelCost,
    placed: PlacementPlan,
    hardware: HardwareSpec,
    memory_gb: float | None,
    token_budget: int | None,
    kv_tokens: int | None,
) -> MemoryPlan:
    from hybridlab.engine.load_plan import plan_load
    from hybridlab.engine.options import host_precision
    from hybridlab.engine.ranks import plan_ranks, spread, threads_of_rank
    from hybridlab.loading import load
    from hybridlab.model.numerics import make_numerics

    engine, defaults = draft.config.engine, inspect.signature(load).parameters
    block = defaults["kv_block_tokens"].default
    if (ranks := engine.ranks or 1) > 1:
        return plan_ranks(
            model.spec,
            spread(placed, model.spec, ranks, "small_ep", type(draft.strategies["placement"]).__name__),
            hardware,
            ranks,
            weight_bytes=model.weight_bytes,
            threads=threads_of_rank(engine.threads, ranks, hardware.device, hardware.num_cores) or 1,
            token_budget=token_budget,
            kv_tokens=kv_tokens,
            kv_block_tokens=block,
            memory_gb=memory_gb,
            precision=engine.precision,
        )
    threads = engine.threads or hardware.num_cores
    return plan_load(
        model.spec,
        placed,
        hardware,
        make_numerics(host_precision(engine.precision), threads),
        weight_bytes=model.weight_bytes,
        threads=threads,
        token_budget=token_budget,
        kv_tokens=kv_tokens,
        kv_block_tokens=block,
        memory_gb=memory_gb,
        weight_layout=engine.weight_layout or defaults["weight_layout"].default,
        precision=engine.precision,
    )


def _rates_key(identity: Mapping[str, Any]) -> str:
    """Runs with equal keys compute equally fast: same backend, model, engine settings and machine."""
    return provenance.digest([identity[name] for name in ("backend", "model", "engine", "machine")])


def _histories(results: Path, wanted: set[str]) -> dict[str, list[pd.DataFrame]]:
    """By rates key, the requests of the newest stored runs of any experiment; runs of the code as it is come first."""
    found: dict[str, list[tuple[bool, str, Path]]] = {}
    for path in results.glob("[!.]*/[!.]*/manifest.json") if wanted else ():
        try:
            manifest = read_manifest(path.parent)
            key, code = _rates_key(manifest["identity"]), manifest["identity"]["code"]
        except (ConfigError, KeyError):
            continue  # not a run, or a damaged one: `hl.results` tells
        if key in wanted and manifest.get("status") != "failed":
            found.setdefault(key, []).append((code == provenance.code_hash(), manifest["started"], path.parent))
    tables: dict[str, list[pd.DataFrame]] = {}
    for key, runs in found.items():
        for *_, folder in sorted(runs, reverse=True)[:MOST_RUNS]:
            with suppress(ConfigError):
                tables.setdefault(key, []).append(read_run(folder).requests)
    return tables
