"""Prefill with experts streamed in several ways, beside the floor: the link alone, and all experts resident."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from hybridlab.bench.decode import made_checkpoint
from hybridlab.bench.devices import DeviceBench, DeviceOptions, RowLog, counts, model_of, origin
from hybridlab.bench.prefill import step_flop
from hybridlab.bench.steps import TimedStep, loads_alone, prompt_step, take_turns, timed, with_overlap
from hybridlab.device_lock import alone
from hybridlab.errors import ConfigError, HybridlabError, MemoryBudgetError
from hybridlab.loading import load
from hybridlab.model.weight_layout import WeightLayout
from hybridlab.plans import Op
from hybridlab.session import Engine
from hybridlab.spec import ModelSpec
from hybridlab.strategies.registry import resolve

RESIDENT, LINK = "all resident", "link alone"
LENGTHS = {"cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768), "emulated": (512, 1024, 2048)}
CPU_EXPERTS_TOKENS = 2048
"""The host's experts are not asked for longer prompts: a step would take minutes."""
ROWS_FILE = "slp.jsonl"
"""What `hl.figures.read_slp` reads."""
COLUMNS = (
    "variant", "of", "preset", "device", "vram_gb", "link_gb_s", "threads", "tokens", "steps", "ttft_s", "ttft_s_min",
    "ttft_s_max", "tokens_per_s", "link_s", "resident_s", "floor_s", "fraction", "tflop_s", "peak_tflop_s", "mfu",
    "load_bytes", "link_busy_s", "compute_busy_s", "first_fill_s", "seconds", "seconds_min", "seconds_max", "gb_s",
    "load_s", "evidence", "machine", "code",
)  # fmt: skip
SHOWN = ("variant", "vram_gb", "tokens", "ttft_s", "tokens_per_s", "floor_s", "fraction", "mfu", "seconds", "gb_s")


@dataclass(frozen=True)
class Variant:
    """One way to compute a prompt. `make` is called as `hl.load`; those that share it and a placement share an engine.

    Prompts of more than `most_tokens` are left out. `limited`: whether `vram_gb` holds for it.
    """

    name: str
    placement: Any
    overlap: str = "prefetch"
    most_tokens: int | None = None
    limited: bool = True
    make: Callable[..., Engine] = load


RING = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 2}
VARIANTS = {
    one.name: one
    for one in (
        Variant(RESIDENT, "all_resident", limited=False),  # a yardstick
        Variant("ring of 2 layers", RING),
        Variant("sequential", RING, "sequential"),
        Variant("ring of 2 x half a layer", {**RING, "parts_per_layer": 2}),
        Variant("one buffer", {**RING, "ring_slots": 1}),
        Variant("CPU experts", "all_host", most_tokens=CPU_EXPERTS_TOKENS),
    )
}


def prefill(
    preset: str = "qwen3-7b-a1b",
    *,
    device: str,
    tokens: Sequence[int] | int | None = None,
    variants: Sequence[str | Variant] | None = None,
    checkpoint: str | Path | None = None,
    layers: int | None = None,
    dtype: str = "fp8",
    vram_gb: float | None = None,
    link_gb_s: float | None = None,
    accelerator_threads: int | None = None,
    threads: int | None = None,
    weight_layout: WeightLayout = "rows",
    steps: int = 5,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> DeviceBench:
    """TTFT of prompts of `tokens` tokens, each computed in one step, in several `variants`.

    Rows: `ttft_s` (median of `steps` steps, seconds from the submission to the token), `ttft_s_min`, `ttft_s_max`,
    `tokens_per_s`; `floor_s` = max(`link_s`, `resident_s`), the loads alone and the same prompt with all experts
    resident, and `fraction` = floor_s / ttft_s; `mfu` = `step_flop` / time / `peak_tflop_s`, the accelerator's ceiling
    right before. Ways that share an engine take turns with the loads alone. All resident is measured in any case, and
    not bound by `vram_gb`; where it does not fit, there is no floor.

    `tokens` defaults to `LENGTHS` up to what the model takes; `variants` are names of `VARIANTS` or `Variant`s, by
    default all of them; `device`, `vram_gb`, `link_gb_s`, `accelerator_threads` as for `hl.load`. With `out`, rows are
    appended to `out`/slp.jsonl as they are made. An interrupt ends it early; the result holds what was measured.
    Raises `ConfigError` for a mistake, and the error of the first variant if none could be measured.
    """
    options = DeviceOptions(device, threads, accelerator_threads, link_gb_s, vram_gb, weight_layout)
    (steps,) = counts("steps", steps)
    chosen = _variants(variants)
    model = model_of(preset, checkpoint, layers, dtype)
    lengths = _lengths(tokens, model, device)
    log = RowLog(None if out is None else Path(out) / ROWS_FILE, COLUMNS, origin(device))
    made = {"layers": layers, "dtype": dtype, "seed": seed}
    complete = True
    with made_checkpoint(preset, checkpoint, made, progress) as folder:
        run = _Run(folder, options, lengths, steps, seed, log, progress)
        try:
            with alone("cpu"):  # as every measured run: the host's cores and memory are part of it
                run.measure(chosen)
        except KeyboardInterrupt:
            if not log.records:
                raise
            complete = False
            run.notes.append(f"interrupted after {len(log.records)} rows")
    if not log.records:
        raise run.errors[0]
    wanted = {one.name for one in chosen[1:]}
    failed = complete and bool(wanted) and wanted.isdisjoint(record["variant"] for record in log.records)
    return DeviceBench("prefill", tuple(log.records), SHOWN, tuple(run.notes), complete, failed)


def _variants(given: Sequence[str | Variant] | None) -> list[Variant]:
    """The yardstick first, then what is asked for, those that share an engine together."""
    if isinstance(given, str):
        given = (given,)
    found = [VARIANTS[RESIDENT]]
    for one in VARIANTS if given is None else given:
        if not isinstance(one, Variant):
            if one not in VARIANTS:
                raise ConfigError(f"variants: unknown {one!r}, expected some of {', '.join(VARIANTS)}")
            one = VARIANTS[one]
        if one.name not in [other.name for other in found]:
            found.append(one)
    return found


def _lengths(given: Sequence[int] | int | None, model: ModelSpec, device: str) -> tuple[int, ...]:
    most = model.max_positions
    if given is None:
        return tuple(n for n in LENGTHS[device] if n <= most) or (most,)
    lengths = counts("tokens", given)
    if lengths[-1] > most:
        raise ConfigError(f"tokens: the model takes prompts of up to {most} tokens, got {lengths[-1]}")
    return lengths


@dataclass
class _Run:
    """Measures variant by variant; `resident_s` and `link_s` make the floor, by length, once they are known."""

    folder: Path
    options: DeviceOptions
    lengths: tuple[int, ...]
    steps: int
    seed: int
    log: RowLog
    progress: bool
    notes: list[str] = field(default_factory=list)
    errors: list[HybridlabError] = field(default_factory=list)
    resident_s: dict[int, float] = field(default_factory=dict)
    link_s: dict[int, float] = field(default_factory=dict)

    def measure(self, variants: Sequence[Variant]) -> None:
        from tqdm.auto import tqdm

        groups: dict[Any, list[Variant]] = defaultdict(list)
        for one in variants:
            groups[repr(one.placement), one.make, one.most_tokens, one.limited].append(one)
        with tqdm(total=len(groups) * len(self.lengths), desc="prefill", disable=not self.progress) as bar:
            for group in groups.values():
                names = ", ".join(one.name for one in group)
                before = bar.n
                bar.set_postfix_str(f"{names}: load")
                try:
                    self._measure_group(group, names, bar)
                except HybridlabError as error:
                    self._missing(names, error)
                bar.update(before + len(self.lengths) - bar.n)

    def _measure_group(self, group: Sequence[Variant], names: str, bar: Any) -> None:
        first = group[0]
        lengths = [n for n in self.lengths if first.most_tokens is None or n <= first.most_tokens]
        if skipped := [n for n in self.lengths if n not in lengths]:
            self.notes.append(f"{names}: left out from {skipped[0]} tokens on, since a step would take long")
        gc.collect()  # the last engine's memory is free from here on
        peak, start_s = self.options.peak_flop_s(), perf_counter()
        engine = self._open(first, names, lengths)
        if engine is None:
            return
        load_s = perf_counter() - start_s
        with engine:
            engine.lone_runtime.wait_mapped()
            for tokens in lengths:
                bar.set_postfix_str(f"{names}: {tokens} tokens")
                self._measure_length(engine, group, tokens, {"load_s": load_s, "peak_flop_s": peak})
                bar.update()

    def _open(self, variant: Variant, names: str, lengths: list[int]) -> Engine | None:
        """An engine for the longest of `lengths` that fits; those that do not are taken out of the list."""
        limits = self.options if variant.limited else replace(self.options, vram_gb=None)
        while lengths:
            room = {"token_budget": lengths[-1], "kv_tokens": lengths[-1] + 16}
            placed = {"placement": variant.placement, "overlap": variant.overlap}
            try:
                return variant.make(self.folder, **limits.given(), **placed, **room, quiet=True)
            except MemoryBudgetError as error:
                self._missing(f"{names}, {lengths.pop()} tokens", error)
        return None

    def _measure_length(self, engine: Engine, group: Sequence[Variant], tokens: int, known: Mapping[str, Any]) -> None:
        calls, loads = {}, ()
        for one in group:
            planner = with_overlap(engine.planner, resolve("overlap", one.overlap))
            step = prompt_step(engine, tokens, planner=planner, seed=self.seed)
            calls[one.name] = partial(timed, engine, step)
            if step.load_ops:
                loads = step.load_ops
                calls[LINK] = partial(timed, engine, loads_alone(step))
        found: dict[str, list[TimedStep]] = {name: [] for name in calls}
        try:
            for name, step in take_turns(calls, self.steps):
                found[name].append(step)
        finally:  # an interrupt keeps what was measured
            load_bytes = sum(len(op.experts) for op in loads) * engine.spec.expert_bytes
            known = {**known, "tokens": tokens, "load_bytes": load_bytes, "threads": engine.threads}
            if link := found.pop(LINK, []):
                self._add(self._link_row(link, group, known))
            for name, steps in found.items():
                if steps:
                    self._add(self._row(name, steps, engine, known))

    def _add(self, row: Mapping[str, Any]) -> None:
        options = self.options
        labels = {"preset": self.folder.name, "device": options.device, "link_gb_s": options.link_gb_s}
        self.log.add({**labels, **row, "evidence": options.evidence})

    def _link_row(self, link: Sequence[TimedStep], group: Sequence[Variant], known: Mapping[str, Any]) -> dict:
        seconds = [step.step_s for step in link]
        self.link_s[known["tokens"]] = median(seconds)
        return {
            "variant": LINK,
            "of": ", ".join(one.name for one in group),
            "vram_gb": self.options.vram_gb if group[0].limited else None,
            **{name: known[name] for name in ("tokens", "load_bytes", "threads", "load_s")},
            "steps": len(link),
            "seconds": median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "gb_s": known["load_bytes"] / median(seconds) / 1e9,
        }

    def _row(self, name: str, steps: Sequence[TimedStep], engine: Engine, known: Mapping[str, Any]) -> dict[str, Any]:
        seconds, tokens, peak = [step.step_s for step in steps], known["tokens"], known["peak_flop_s"]
        ttft_s = median(seconds)
        limited = name != RESIDENT
        if not limited:
            self.resident_s[tokens] = ttft_s
        link_s, resident_s = self.link_s.get(tokens), self.resident_s.get(tokens)
        floor_s = None if link_s is None or resident_s is None else max(link_s, resident_s)
        flop_s = step_flop(engine.spec, tokens) / ttft_s
        return {
            "variant": name,
            "vram_gb": self.options.vram_gb if limited else None,
            **{key: known[key] for key in ("tokens", "load_bytes", "threads", "load_s")},
            "steps": len(steps),
            "ttft_s": ttft_s,
            "ttft_s_min": min(seconds),
            "ttft_s_max": max(seconds),
            "tokens_per_s": tokens / ttft_s,
            "link_s": link_s,
            "resident_s": resident_s,
            "floor_s": floor_s,
            "fraction": None if floor_s is None else floor_s / ttft_s,
            "tflop_s": flop_s / 1e12,
            "peak_tflop_s": None if peak is None else peak / 1e12,
            "mfu": None if peak is None else flop_s / peak,
            "link_busy_s": median(step.busy_s(_is_load) for step in steps),
            "compute_busy_s": median(step.busy_s(lambda op: not _is_load(op)) for step in steps),
            "first_fill_s": median(_first_fill_s(step) for step in steps),
        }

    def _missing(self, what: str, error: HybridlabError) -> None:
        self.errors.append(type(error)(*error.args))  # a new one: frames would keep the engine and its memory
        self.notes.append(f"{what}: {error}")


def _is_load(op: Op) -> bool:
    return op.kind == "load"


def _first_fill_s(step: TimedStep) -> float:
    return next((span.end_s - span.start_s for span in step.spans if _is_load(span.op)), 0.0)
