"""`hl.calibrate`: whole steps on each path, over sizes of steps, taking turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hybridlab.bench.devices import DeviceOptions, counts
from hybridlab.bench.steps import TimedStep, decode_steps, prompt_step, take_turns, timed
from hybridlab.calibration.files import subject_of, write_calibration
from hybridlab.calibration.results import CPU, DUAL, MIXED, PLAIN, STREAMED, Calibration, Crossovers, Point
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine.captured_steps import CAPTURE_FROM
from hybridlab.engine.options import check_format, check_numbers
from hybridlab.errors import ConfigError
from hybridlab.loading import load
from hybridlab.lowering import Planner
from hybridlab.model.weight_layout import WeightLayout
from hybridlab.plans import LaneKind, Span
from hybridlab.provenance import code_hash, code_version
from hybridlab.spec import NEVER
from hybridlab.strategies.overlap.dual_batch import DualBatch
from hybridlab.strategies.overlap.prefetch import Prefetch
from hybridlab.strategies.placement.streamed import Streamed

if TYPE_CHECKING:
    from hybridlab.session import Engine
    from hybridlab.strategies.base import Overlap

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
REQUESTS = (2, 4, 6, 8, 16, 32)
MIXES = ((0.5, 1), (0.25, 1), (0.75, 1), (0.5, 4), (0.5, 16))
"""(share that crosses the link, tokens that an arrived expert must have to be computed on the GPU); the first is the
one that the others must beat."""
FAR_BEHIND = 4.0
"""A path this many times slower than the streamed one is not measured at more tokens: the CPU only falls behind."""
DECODE_SHARE = 0.3
"""Of the time for steps, at most; prompts get the rest."""
LEAST_REPEATS = 2


@dataclass(frozen=True)
class _Path:
    """How a step is forced to be computed."""

    name: str
    placement: Streamed
    overlap: Overlap
    share: float = 0.0
    min_tokens: int = 0

    def planner(self, engine: Engine) -> Planner:
        kept = engine.planner
        return Planner(kept.model, kept.hardware, self.placement, self.overlap, kept.placed)


def _mixed(share: float, least: int) -> _Path:
    placement = Streamed(stream_from_tokens=NEVER, mixed_from_tokens=1, mixed_share=share, min_expert_tokens=least)
    return _Path(MIXED, placement, Prefetch(), share, least)


_ON_CPU = Streamed(stream_from_tokens=NEVER)
_PREFILL = (
    _Path(CPU, _ON_CPU, Prefetch()),
    _Path(STREAMED, Streamed(stream_from_tokens=1), Prefetch(), 1.0, 1),
    *(_mixed(*mix) for mix in MIXES),
)
_DECODE = (_Path(PLAIN, _ON_CPU, Prefetch()), _Path(DUAL, _ON_CPU, DualBatch(min_requests=2)))


def calibrate(
    path: str | Path,
    device: str = "cuda",
    *,
    layers: int = 4,
    max_tokens: int = 8192,
    requests: Sequence[int] = REQUESTS,
    depth: int = 1024,
    repeats: int = 5,
    seconds: float = 90.0,
    threads: int | None = None,
    accelerator_threads: int | None = None,
    link_gb_s: float | None = None,
    vram_gb: float | None = None,
    precision: str = "bf16",
    weight_layout: WeightLayout = "rows",
    save: bool = True,
    progress: bool = True,
) -> Calibration:
    """Measure from how many tokens a step of this model on this machine is faster on which path.

    Steps of the real engine on the first `layers` MoE layers of the checkpoint, which are taken to be like the others:
    prompts of 1 to `max_tokens` tokens with the experts on the CPU, streamed, and mixed; decode steps of `requests`
    requests, each `depth` tokens deep, plain and as dual batch, with the experts on the CPU. Each point is the median
    of up to `repeats` steps; longer prompts are left out when `seconds` (loading not counted) are over. An interrupt
    ends the measuring: what is there is returned, with `complete` False.

    With `save`, a whole calibration is kept where `hl.load` finds it for the same machine, model, `device`, `threads`,
    `accelerator_threads`, `link_gb_s`, `precision` and `weight_layout`. Raises `ConfigError`, `CheckpointError` or
    `MemoryBudgetError` in one line.
    """
    options = DeviceOptions(device, threads, accelerator_threads, link_gb_s, vram_gb, weight_layout)
    numbers = {"layers": layers, "max_tokens": max_tokens, "depth": depth, "repeats": repeats}
    check_numbers(numbers, {"seconds": seconds})
    check_format(precision, weight_layout, device)
    decoding = counts("requests", requests)
    for name, least in (("repeats", repeats), ("requests", min(decoding))):
        if least < 2:
            raise ConfigError(f"{name}: expected at least 2, got {least}")
    whole = open_checkpoint(path)
    if not whole.spec.moe_layers:
        raise ConfigError(f"{whole.folder}: the model has no MoE layer, so that there is no path to choose")
    cut = whole.first_moe_layers(layers)
    subject = subject_of(
        whole.spec,
        device=device,
        threads=threads,
        accelerator_threads=accelerator_threads,
        link_gb_s=link_gb_s,
        precision=precision,
        weight_layout=weight_layout,
    )
    most = min(max_tokens, whole.spec.max_positions)
    deep = min(depth, whole.spec.max_positions // 2)
    longest = deep + CAPTURE_FROM + 1 + repeats + 16  # each decode step is a token deeper; blocks are rounded down
    room = max(most + 16, max(decoding) * longest)
    points: list[Point] = []
    complete = True
    loaded: dict[str, Any] = {"placement": Streamed(stream_from_tokens=1), "overlap": "prefetch", "quiet": True}
    loaded |= {"precision": precision, "token_budget": max(most, *decoding), "kv_tokens": room}
    with load(cut, **options.given(), **loaded) as engine:
        bench = _Bench(engine, len(whole.spec.moe_layers), repeats, seconds, progress)
        try:
            points.extend(bench.points(decoding, deep, _sizes(most)))
        except KeyboardInterrupt:
            if not points:
                raise
            complete = False
    version = code_version()
    commit = version.get("commit", version.get("version", "unknown"))[:12]
    found = Calibration(
        subject=subject,
        name=whole.folder.name,
        points=tuple(points),
        crossovers=Crossovers.of(points, whole=any(p.kind == "prefill" and p.tokens == most for p in points)),
        layers=len(cut.spec.moe_layers),
        day=date.today().isoformat(),
        code=code_hash(),
        commit=f"{commit}+{version['dirty']}" if "dirty" in version else commit,
        evidence="emulated" if device == "emulated" else "measured",
        complete=complete,
    )
    if save and complete:
        write_calibration(found)
    return found


def _sizes(most: int) -> tuple[int, ...]:
    """Those of `TOKENS` below `most`, and `most`."""
    return (*(tokens for tokens in TOKENS if tokens < most), most)


class _Bench:
    """Times all paths of one size by turns, size after size, until the time is over."""

    def __init__(self, engine: Engine, model_layers: int, repeats: int, seconds: float, progress: bool) -> None:
        self._engine, self._model_layers = engine, model_layers
        self._repeats, self._seconds, self._progress = repeats, seconds, progress
        engine.lone_runtime.wait_mapped()

    def points(self, requests: Sequence[int], depth: int, sizes: Sequence[int]) -> Iterator[Point]:
        """Decoding first: it is short."""
        from tqdm.auto import tqdm

        self._engine.lone_runtime.randomise_cache(0)
        start_s = perf_counter()
        with tqdm(total=len(requests) + len(sizes), desc="calibrate", unit="size", disable=not self._progress) as bar:
            for number in requests:
                bar.set_postfix_str(f"{number} requests")
                left_s = start_s + DECODE_SHARE * self._seconds - perf_counter()
                yield from self._decode(number, depth, left_s)
                bar.update()
            paths = _PREFILL
            for tokens in sizes:
                bar.set_postfix_str(f"{tokens:,} tokens")
                points = list(self._prefill(tokens, paths, start_s + self._seconds - perf_counter()))
                if not points:
                    break
                yield from points
                paths = _still_near(paths, points)
                bar.update()

    def _decode(self, number: int, depth: int, left_s: float) -> Iterator[Point]:
        steps = {path: decode_steps(self._engine, path.planner(self._engine), number, depth) for path in _DECODE}
        calls = {path: lambda path=path: timed(self._engine, next(steps[path])) for path in _DECODE}
        return self._by_turns("decode", number, calls, left_s)

    def _prefill(self, tokens: int, paths: Sequence[_Path], left_s: float) -> Iterator[Point]:
        apart = [path for path in paths if path.min_tokens <= tokens]
        steps = {path: prompt_step(self._engine, tokens, planner=path.planner(self._engine)) for path in apart}
        calls = {path: lambda path=path: timed(self._engine, steps[path]) for path in apart}
        return self._by_turns("prefill", tokens, calls, left_s)

    def _by_turns(self, kind: Any, size: int, calls: Mapping[_Path, Any], left_s: float) -> Iterator[Point]:
        """Points of the paths in `calls`; none if the time left is too short for them."""
        named = {str(number): call for number, call in enumerate(calls.values())}
        one_token_each = kind == "decode" or size == 1
        list(take_turns(named, 0, warmup=CAPTURE_FROM if one_token_each else 0))  # until such steps are replayed
        start_s = perf_counter()
        list(take_turns(named, 0, warmup=1))
        round_s = perf_counter() - start_s
        repeats = min(self._repeats, int((left_s - round_s) / round_s))
        if repeats < LEAST_REPEATS:
            return
        found: dict[str, list[_Timing]] = {name: [] for name in named}
        for name, step in take_turns(named, repeats, warmup=0):
            found[name].append(_timing(step, self._model_layers))
        for path, timings in zip(calls, found.values(), strict=True):
            yield _point(kind, path, size, timings)


def _still_near(paths: Sequence[_Path], points: Sequence[Point]) -> tuple[_Path, ...]:
    streamed_s = next(point.step_s for point in points if point.path == STREAMED)
    far = {(point.path, point.share, point.min_tokens) for point in points if point.step_s > FAR_BEHIND * streamed_s}
    return tuple(path for path in paths if path.name == STREAMED or (path.name, path.share, path.min_tokens) not in far)


@dataclass(frozen=True)
class _Timing:
    layer_s: float
    step_s: float
    cpu_experts_s: float
    link_s: float
    gpu_experts_s: float
    other_s: float


def _timing(step: TimedStep, model_layers: int) -> _Timing:
    """A layer's seconds by the ends of its sums, so that embedding, head and the first load are no part of them."""
    ends: dict[int, float] = {}
    for span in step.spans:
        if span.op.kind == "combine":
            ends[span.op.layer] = max(ends.get(span.op.layer, 0.0), span.end_s)
    in_order = [ends[layer] for layer in sorted(ends)]
    first_s = in_order[0] - min(span.start_s for span in step.spans)
    later = [b - a for a, b in pairwise(in_order)]
    layer_s = sum(later) / len(later) if later else first_s
    sums = {"cpu_experts_s": 0.0, "link_s": 0.0, "gpu_experts_s": 0.0, "other_s": 0.0}
    for span in step.spans:
        if (part := _part(span)) is not None:
            sums[part] += (span.end_s - span.start_s) / len(ends)
    if sums["link_s"] and sums["cpu_experts_s"]:
        # What the ring took ahead while the CPU computed the first layer must not look like a fast link: of many
        # layers, each takes at least as long as the slowest lane needs for it.
        gpu_s = sums["gpu_experts_s"] + sums["other_s"]
        layer_s = max(layer_s, sums["link_s"], sums["cpu_experts_s"], gpu_s)
    return _Timing(layer_s, first_s + (model_layers - 1) * layer_s, **sums)


def _part(span: Span) -> str | None:
    op = span.op
    if op.kind == "load":
        return "link_s"
    if op.kind == "experts":
        return "cpu_experts_s" if op.lane.kind is LaneKind.CPU else "gpu_experts_s"
    return "other_s" if op.kind in ("attention", "router", "combine") else None


def _point(kind: Any, path: _Path, size: int, timings: Sequence[_Timing]) -> Point:
    middle = {name: median(getattr(one, name) for one in timings) for name in _Timing.__dataclass_fields__}
    layers = [one.layer_s for one in timings]
    where: Any = path.name
    return Point(
        kind, where, size, path.share, path.min_tokens, len(timings), layer_s_min=min(layers), layer_s_max=max(layers),
        **middle,
    )  # fmt: skip
