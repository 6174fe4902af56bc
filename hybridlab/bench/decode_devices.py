"""Decode with experts on the host: the same requests as a plain batch and as a dual batch, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from hybridlab.bench.decode import made_checkpoint
from hybridlab.bench.devices import DeviceBench, DeviceOptions, RowLog, counts, model_of, origin
from hybridlab.bench.steps import (
    Step,
    TimedStep,
    bound_s,
    decode_steps,
    hand_offs,
    take_turns,
    timed,
    with_overlap,
)
from hybridlab.device_lock import alone
from hybridlab.errors import ConfigError, HybridlabError
from hybridlab.loading import load
from hybridlab.lowering import Planner
from hybridlab.model.weight_layout import WeightLayout
from hybridlab.plans import Op
from hybridlab.session import Engine
from hybridlab.strategies.overlap.dual_batch import DualBatch
from hybridlab.strategies.overlap.prefetch import Prefetch

PLAIN, DUAL, CPU = "plain batch", "dual batch", "device cpu"
BATCHES = (1, 2, 4, 6, 8)
DEPTH, STEPS, WARMUP = 1024, 32, 4
ROWS_FILE = "decode.jsonl"
COLUMNS = (
    "variant", "preset", "device", "batch", "depth", "steps", "threads", "accelerator_threads", "tpot_s", "tpot_s_q1",
    "tpot_s_q3", "tpot_s_min", "tpot_s_max", "tokens_per_s", "times_plain", "attention_busy_s", "experts_busy_s",
    "bound_s", "fraction", "to_host_s", "to_gpu_s", "hand_offs_s", "evidence", "machine", "code",
)  # fmt: skip
SHOWN = (
    "variant", "batch", "tpot_s", "tpot_s_q1", "tpot_s_q3", "tokens_per_s", "times_plain", "attention_busy_s",
    "experts_busy_s", "bound_s", "fraction", "hand_offs_s",
)  # fmt: skip


def decode(
    preset: str = "qwen3-7b-a1b",
    *,
    device: str,
    batch: Sequence[int] | int = BATCHES,
    depth: int = DEPTH,
    steps: int = STEPS,
    beside_cpu: bool = False,
    checkpoint: str | Path | None = None,
    layers: int | None = None,
    dtype: str = "fp8",
    vram_gb: float | None = None,
    link_gb_s: float | None = None,
    accelerator_threads: int | None = None,
    threads: int | None = None,
    weight_layout: WeightLayout = "rows",
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> DeviceBench:
    """Decode steps of so many requests at `depth` tokens of random context: attention on `device`, experts on the host.

    For each number of requests `steps` rounds: in each, the same tokens of the same requests once as a plain batch,
    once as a dual batch (from two requests on), and with `beside_cpu` once more by an engine of device "cpu".

    Rows: `tpot_s`, what each user waits for a token (median of the steps, with quartiles, least and most), beside
    `tokens_per_s` of all; `times_plain`, the plain batch's time over this one's, round by round; `attention_busy_s` and
    `experts_busy_s`, the sums of the ops on the accelerator's and on the host's lane; `bound_s` as
    `bench.steps.bound_s`, from the same steps' ops, and `fraction` = bound_s / tpot_s; `hand_offs_s`, all waits for the
    other lane that nothing hides, `to_host_s` and `to_gpu_s` the median one of each way. Of "device cpu", whose lanes
    are one, only the sums of the ops.

    `device`, `vram_gb`, `link_gb_s`, `accelerator_threads` as for `hl.load`. With `out`, rows are appended to
    `out`/decode.jsonl as they are made. An interrupt ends it early; the result holds what was measured.
    Raises `ConfigError` for a mistake, and what ended it before the first row; later on that is a note.
    """
    options = DeviceOptions(device, threads, accelerator_threads, link_gb_s, vram_gb, weight_layout)
    (steps,), batches = counts("steps", steps), counts("batch", batch)
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
        raise ConfigError(f"depth is {depth!r}, expected an int >= 0")
    model = model_of(preset, checkpoint, layers, dtype)
    deepest = depth + WARMUP + steps
    if deepest > model.max_positions:
        raise ConfigError(
            f"depth: {deepest} positions needed, the model has {model.max_positions}; lower depth or steps"
        )
    log = RowLog(None if out is None else Path(out) / ROWS_FILE, COLUMNS, origin(device))
    made = {"layers": layers, "dtype": dtype, "seed": seed}
    notes: list[str] = []
    complete = True
    room: dict[str, Any] = {"token_budget": max(batches[-1], 64), "kv_tokens": batches[-1] * (deepest + 16)}
    with made_checkpoint(preset, checkpoint, made, progress) as folder:
        try:
            with alone("cpu"), ExitStack() as held:  # as every measured run
                engines = [load(folder, **options.given(), overlap="prefetch", **room, quiet=True)]
                held.enter_context(engines[0])
                if beside_cpu:
                    on_cpu = {"device": "cpu", "threads": threads, "weight_layout": weight_layout, **room}
                    engines.append(held.enter_context(load(folder, **on_cpu, quiet=True)))
                _Run(engines, options, depth, steps, seed, log, folder.name, progress).measure(batches)
        except KeyboardInterrupt:
            if not log.records:
                raise
            complete = False
            notes.append(f"interrupted after {len(log.records)} rows")
        except HybridlabError as error:
            if not log.records:
                raise
            notes.append(f"ended after {len(log.records)} rows: {error}")
    return DeviceBench("decode", tuple(log.records), SHOWN, tuple(notes), complete)


@dataclass
class _Run:
    """Measures batch by batch on `engines`: the device's, and one of device "cpu" if asked for."""

    engines: Sequence[Engine]
    options: DeviceOptions
    depth: int
    steps: int
    seed: int
    log: RowLog
    preset: str
    progress: bool

    def measure(self, batches: Sequence[int]) -> None:
        from tqdm.auto import tqdm

        for engine in self.engines:
            engine.lone_runtime.wait_mapped()
            engine.lone_runtime.randomise_cache(self.seed)
        calls = {batch: self._calls(batch) for batch in batches}
        total = sum(len(named) for named in calls.values()) * self.steps
        with tqdm(total=total, desc="decode", disable=not self.progress) as bar:
            for batch in batches:
                bar.set_postfix_str(f"batch {batch}")
                found: dict[str, list[TimedStep]] = {name: [] for name in calls[batch]}
                try:
                    for name, step in take_turns(calls[batch], self.steps, warmup=WARMUP):
                        found[name].append(step)
                        bar.update()
                finally:  # an interrupt keeps what was measured
                    for name, steps in found.items():
                        if steps:
                            self.log.add(self._row(name, batch, steps, found[PLAIN]))

    def _calls(self, batch: int) -> dict[str, Callable[[], TimedStep]]:
        engine = self.engines[0]
        ways: dict[str, tuple[Engine, Planner]] = {PLAIN: (engine, with_overlap(engine.planner, Prefetch()))}
        if batch > 1:
            ways[DUAL] = (engine, with_overlap(engine.planner, DualBatch(min_requests=2)))
        for other in self.engines[1:]:
            ways[CPU] = (other, other.planner)
        return {
            name: _next(one, decode_steps(one, planner, batch, self.depth, seed=self.seed))
            for name, (one, planner) in ways.items()
        }

    def _row(self, name: str, batch: int, steps: Sequence[TimedStep], plain: Sequence[TimedStep]) -> dict[str, Any]:
        on_cpu, options, seconds = name == CPU, self.options, [step.step_s for step in steps]
        tpot_s = median(seconds)
        low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (tpot_s, tpot_s, tpot_s)
        ratios = [before.step_s / step.step_s for before, step in zip(plain, steps, strict=False)]
        row: dict[str, Any] = {
            "variant": name,
            "preset": self.preset,
            "device": "cpu" if on_cpu else options.device,
            "batch": batch,
            "depth": self.depth,
            "steps": len(steps),
            "threads": self.engines[0].threads,
            "accelerator_threads": options.chosen_accelerator_threads if options.device == "emulated" else None,
            "tpot_s": tpot_s,
            "tpot_s_q1": low,
            "tpot_s_q3": high,
            "tpot_s_min": min(seconds),
            "tpot_s_max": max(seconds),
            "tokens_per_s": batch / tpot_s,
            "times_plain": median(ratios) if ratios else None,
            "attention_busy_s": median(step.busy_s(lambda op: not _is_experts(op)) for step in steps),
            "experts_busy_s": median(step.busy_s(_is_experts) for step in steps),
            "evidence": "measured" if on_cpu else options.evidence,
        }
        if on_cpu:
            return row
        waits, bounds = [hand_offs(step.spans) for step in steps], [bound_s(step.spans) for step in steps]
        return {
            **row,
            "bound_s": median(bounds),
            "fraction": median(bound / taken for bound, taken in zip(bounds, seconds, strict=True)),
            "to_host_s": median(one.to_host_s for one in waits),
            "to_gpu_s": median(one.to_gpu_s for one in waits),
            "hand_offs_s": median(one.total_s for one in waits),
        }


def _next(engine: Engine, steps: Iterator[Step]) -> Callable[[], TimedStep]:
    return lambda: timed(engine, next(steps))


def _is_experts(op: Op) -> bool:
    return op.kind == "experts"
