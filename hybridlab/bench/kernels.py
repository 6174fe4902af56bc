"""`hybridlab bench kernels`: how close our kernels come to what this machine reads and multiplies, and peers beside.

Every number is a median over trials in which the kernels, their peers and the loops that measure the ceilings take
turns (see `bench.timing`). M, the number of tokens multiplied at once, is `rows` in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlab import kernels
from hybridlab.bench import plan as bench_plan
from hybridlab.bench import targets as bench_targets
from hybridlab.bench.peers import find_peers, torch_threads
from hybridlab.bench.plan import Point, Settings
from hybridlab.bench.shapes import ROWS, layers_of
from hybridlab.bench.timing import Ceilings, Samples, Work, row_of, time_together
from hybridlab.bench.weights import WeightPool, out_of_cache_bytes, resident_bytes
from hybridlab.device_lock import alone
from hybridlab.errors import ConfigError
from hybridlab.hardware.cores import detect_cores
from hybridlab.provenance import code_version, machine, versions

if TYPE_CHECKING:
    import pandas as pd

FULL_S, QUICK_S = 0.25, 0.02
QUICK_SHAPES, QUICK_ROWS = ("qwen3-7b-a1b",), (1, 4, 16, 64)
QUICK_PEERS = ("torch_bf16",)
MOST_ROWS = 65536


@dataclass(frozen=True)
class KernelBench:
    """What `run` measured: `table` has one row per point, `targets` what the kernels are to reach.

    `notes` say what is missing; `complete` is False if it was interrupted.
    """

    table: pd.DataFrame
    machine: dict[str, Any]
    versions: dict[str, str]
    code: dict[str, str]
    notes: tuple[str, ...] = ()
    complete: bool = True
    day: str = field(default_factory=lambda: date.today().isoformat())

    @property
    def targets(self) -> pd.DataFrame:
        """One row per target: measured, quartiles, must, aim, and the point that it is read from."""
        return bench_targets.targets_table(self.table)

    def meta(self) -> dict[str, Any]:
        """Everything but the tables."""
        told = {"machine": self.machine, "versions": self.versions, "code": self.code}
        return {**told, "day": self.day, "notes": list(self.notes), "complete": self.complete}

    def as_dict(self) -> dict[str, Any]:
        return {**self.meta(), **{name: getattr(self, name).to_dict("records") for name in ("table", "targets")}}

    def __str__(self) -> str:
        where = f"{self.machine['cpu']}, {self.machine['cores']} cores, {self.machine['isa']}"
        lines = [f"CPU kernels, {len(self.table)} points (measured), medians; {where}"]
        if len(self.table):
            for threads, rows in self.table[self.table["place"] == "memory"].groupby("threads"):
                read, peak = (median(rows[name].tolist()) for name in ("read_gb_s", "multiply_gflop_s"))
                lines.append(f"  ceilings, {threads} threads: read {read:.1f} GB/s, multiply {peak:.0f} GFLOP/s")
            lines.append(bench_targets.shown(self.targets))
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"


def run(
    shapes: Sequence[str] | None = None,
    *,
    rows: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    seconds: float | None = None,
    peers: Sequence[str] | None = None,
    quick: bool = False,
    progress: bool = True,
) -> KernelBench:
    """Time our kernels and their peers on the shapes of models, against the ceilings measured in between.

    `shapes` are names of `bench.shapes.LAYERS`, `rows` the numbers of tokens (M), `threads` thread counts (default: 1
    and every usable core), `seconds` the time for each point, `peers` names of `bench.peers.PEERS` (() for none).
    `quick` has other defaults: one shape, four M, torch alone, seconds in all instead of minutes.

    An interrupt ends it early; the result then holds the points that were done. Raises ConfigError for a mistake.
    """
    import pandas as pd

    settings = Settings(
        layers=layers_of(QUICK_SHAPES if shapes is None and quick else shapes),
        rows=_counts("rows", rows, QUICK_ROWS if quick else ROWS, MOST_ROWS),
        threads=_counts("threads", threads, sorted({1, detect_cores().usable}), 1024),
        seconds=_positive(seconds, QUICK_S if quick else FULL_S),
    )
    there, notes = find_peers(QUICK_PEERS if peers is None and quick else peers)
    if kernels.tier() == "numpy":
        raise ConfigError("bench kernels: needs a compiled kernel tier; see hybridlab doctor")
    found: list[dict[str, Any]] = []
    complete = True
    try:
        with alone("cpu"):  # as every measured run: beside another one it would time both
            _measure(settings, there, found, progress)
    except KeyboardInterrupt:
        if not found:
            raise
        complete = False
        notes.append(f"interrupted after {len(found)} points")
    host, code = machine(), code_version()
    told = {"evidence": "measured", "machine": f"{host['cpu']}, {host['cores']} cores", "code": _short(code)}
    table = pd.DataFrame([{**row, **told} for row in found])
    return KernelBench(table, host, versions(), code, tuple(notes), complete)


def _measure(settings: Settings, peers: Sequence[str], found: list[dict[str, Any]], progress: bool) -> None:
    """Append the rows of all points to `found`, as they are done."""
    from tqdm.auto import tqdm

    pool = WeightPool(settings.pool_bytes(out_of_cache_bytes()))
    sections = bench_plan.sections(settings, peers, pool)
    ceilings = _ceilings(pool)
    with tqdm(total=sum(len(one.points) for one in sections), desc="kernels", disable=not progress) as bar:
        for section in sections:
            with ExitStack() as held:
                makers: dict[Any, list[Any]] = {}
                for point in section.points:
                    bar.set_postfix_str(f"{section.label} M={point.rows} {point.place} {point.threads} threads")
                    if point.contenders_key not in makers:
                        makers[point.contenders_key] = section.contenders(point)
                        for one in makers[point.contenders_key]:
                            held.callback(getattr(one, "close", _nothing))
                    works = section.works(point, makers[point.contenders_key])
                    with torch_threads(point.threads, peers):
                        samples = time_together(works, ceilings(point), settings.seconds)
                    found += rows_of(works, samples, ceilings(point).loop)
                    bar.update()


def rows_of(works: Sequence[Work], samples: Sequence[Samples], loop: int) -> Iterator[dict[str, Any]]:
    """The table's rows of works that took turns; the first, our FP8 kernel, is what the others are slower than."""
    baseline = None if works[0].labels["slow_tier"] else samples[0]
    for work, found in zip(works, samples, strict=True):
        yield {**row_of(work, found, baseline), "read_loop": kernels.READ_LOOPS[loop]}


def _ceilings(pool: WeightPool) -> Callable[[Point], Ceilings]:
    """The yardstick of a point: one per kind of buffer and thread count, with the loop chosen once."""
    made: dict[tuple[bool, int], Ceilings] = {}

    def of(point: Point) -> Ceilings:
        key = (point.place == "l3", point.threads)
        if key not in made:
            buffer = np.tile(pool.some(1 << 20), -(-resident_bytes() >> 20)) if key[0] else pool.read_buffer()
            made[key] = Ceilings(buffer, point.threads, resident=key[0])
        return made[key]

    return of


def _nothing() -> None:
    pass


def _counts(name: str, given: Sequence[int] | int | None, default: Sequence[int], most: int) -> tuple[int, ...]:
    values = default if given is None else (given,) if isinstance(given, int) else tuple(given)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ConfigError(f"bench kernels: {name}: expected integers from 1 to {most}, got {value!r}")
    if not values:
        raise ConfigError(f"bench kernels: {name}: expected at least one number, got none")
    return tuple(sorted(set(values)))


def _positive(given: float | None, default: float) -> float:
    value = default if given is None else given
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600:
        raise ConfigError(f"bench kernels: seconds: expected a number above 0, at most 3600, got {value!r}")
    return float(value)


def _short(code: dict[str, str]) -> str:
    commit = code.get("commit", code.get("version", "unknown"))[:12]
    return f"{commit}+{code['dirty']}" if "dirty" in code else commit
