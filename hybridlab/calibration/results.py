"""What `hybridlab calibrate` found: seconds of every path over sizes of steps, and the thresholds that follow."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import log
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field

from hybridlab.calibration.crossovers import MARGIN, crossover, mixed_range
from hybridlab.columns import Evidence
from hybridlab.provenance import digest
from hybridlab.spec import NEVER, HardwareSpec

if TYPE_CHECKING:
    import pandas as pd

CPU, MIXED, STREAMED, PLAIN, DUAL = "cpu", "mixed", "streamed", "plain", "dual batch"
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Subject:
    """What was calibrated; a calibration holds for an equal one only. `link_gb_s` is the cap of an emulated link."""

    __pydantic_config__ = _STRICT

    model: dict[str, str | int | float | bool]
    machine: dict[str, str | int | list[str]]
    device: Literal["emulated", "cuda"]
    threads: Count
    accelerator_threads: int
    link_gb_s: float | None
    precision: str
    weight_layout: str

    @cached_property
    def key(self) -> str:
        return digest({**asdict(self), "link_gb_s": None if self.link_gb_s is None else float(self.link_gb_s)}, 16)


@dataclass(frozen=True)
class Point:
    """One path at one size: medians over `repeats` steps, in seconds.

    `tokens` of a prompt ("prefill"), or decoding requests of one token each ("decode"). `layer_s` is the time from one
    layer's end to the next one's; `step_s` is that for all layers of the model, with what the first one waits for. The
    others are sums of the spans of a layer: the CPU's experts, the link, the GPU's experts, and attention, router and
    sum; they overlap. On the mixed path a `share` of the experts crosses the link, and those with `min_tokens` tokens
    run on the GPU.
    """

    __pydantic_config__ = _STRICT

    kind: Literal["prefill", "decode"]
    path: Literal["cpu", "mixed", "streamed", "plain", "dual batch"]
    tokens: Count
    share: Share
    min_tokens: Annotated[int, Field(ge=0)]
    repeats: Count
    layer_s: Seconds
    layer_s_min: Seconds
    layer_s_max: Seconds
    step_s: Seconds
    cpu_experts_s: Annotated[float, Field(ge=0)]
    link_s: Annotated[float, Field(ge=0)]
    gpu_experts_s: Annotated[float, Field(ge=0)]
    other_s: Annotated[float, Field(ge=0)]

    @property
    def noise(self) -> float:
        """Half of what lies between the fastest and the slowest repeat, as a share."""
        return log(self.layer_s_max / self.layer_s_min) / 2


@dataclass(frozen=True)
class Crossovers:
    """Thresholds as in `HardwareSpec`, in tokens of a step or requests; None: not measured, `NEVER`: never faster.

    `mixed_gain` says how much faster mixed steps are than the better of the other two, in the geometric mean.
    """

    __pydantic_config__ = _STRICT

    stream_from_tokens: Count | None = None
    mixed_from_tokens: Count | None = None
    mixed_to_tokens: Count | None = None
    mixed_share: Share | None = None
    min_expert_tokens: Count | None = None
    mixed_gain: float = 1.0
    dual_batch_from_requests: Count | None = None
    dual_batch_to_requests: Count | None = None

    @classmethod
    def of(cls, points: Iterable[Point], whole: bool = True) -> Crossovers:
        """By the seconds of whole steps; of several mixed paths the one that saves most (`calibration.crossovers`).

        If the measuring ended before the longest prompts (not `whole`), what was not faster by then may be later: None.
        """
        curves: dict[tuple[str, float, int], dict[int, float]] = {}
        noise: dict[tuple[str, float, int], dict[int, float]] = {}
        for point in points:
            share, least = (point.share, point.min_tokens) if point.path == MIXED else (0.0, 0)
            curves.setdefault((point.path, share, least), {})[point.tokens] = point.step_s
            noise.setdefault((point.path, share, least), {})[point.tokens] = point.noise
        cpu, streamed, plain, dual = (curves.get((path, 0.0, 0)) for path in (CPU, STREAMED, PLAIN, DUAL))
        found = cls()
        if plain and dual:
            between = mixed_range(plain, dual, plain, noise[DUAL, 0.0, 0])
            end = between.end if between.begin < NEVER else NEVER
            found = cls(dual_batch_from_requests=between.begin, dual_batch_to_requests=end)
        if not (cpu and streamed):
            return found
        stream_from = crossover(cpu, streamed, noise[STREAMED, 0.0, 0])
        found = replace(found, stream_from_tokens=stream_from if whole or stream_from < NEVER else None)
        ranges = {
            (share, least): mixed_range(cpu, curve, streamed, noise[path, share, least])
            for (path, share, least), curve in curves.items()
            if path == MIXED
        }
        if not ranges:
            return found
        best = next(iter(ranges))
        for variant, one in ranges.items():  # in the order of measuring: simpler ones first
            if one.saved > ranges[best].saved + MARGIN:
                best = variant
        mixed = ranges[best]
        if mixed.begin == NEVER and not whole:
            return found
        return replace(
            found,
            mixed_from_tokens=mixed.begin,
            mixed_to_tokens=mixed.end,
            mixed_share=best[0],
            min_expert_tokens=best[1],
            mixed_gain=mixed.gain,
        )

    def lines(self) -> list[str]:
        """What was found, for people."""
        found = []
        if (stream := self.stream_from_tokens) is not None:
            found.append(f"streaming all experts beats the CPU {_from(stream, 'tokens')}")
        if (begin := self.mixed_from_tokens) is not None and begin < NEVER:
            what = f"{self.mixed_share:.0%} streamed, the CPU computes the rest"
            if (self.min_expert_tokens or 1) > 1:
                what += f" and experts of fewer than {self.min_expert_tokens} tokens"
            end = "" if (self.mixed_to_tokens or NEVER) == NEVER else f" to {self.mixed_to_tokens:,}"
            found.append(f"mixed ({what}) beats both from {begin:,}{end} tokens, by {self.mixed_gain:.2f}x")
        elif begin is not None:
            found.append("mixed never beats both")
        if (dual := self.dual_batch_from_requests) is not None:
            end = self.dual_batch_to_requests or NEVER
            to = "" if end == NEVER else f" to {end - 1:,}"
            found.append(f"dual batch beats plain decode {_from(dual, 'requests')}{to}")
        return found or ["too little was measured for a threshold"]


@dataclass(frozen=True)
class Calibration:
    """Points and thresholds of one machine and model.

    `layers` MoE layers of the model were measured, which all are alike. `complete` is False if the run was interrupted;
    those are not kept as a file. `day` is ISO, `code` the hash of the code that can change a measurement.
    """

    __pydantic_config__ = _STRICT

    subject: Subject
    name: str
    points: tuple[Point, ...]
    crossovers: Crossovers
    layers: Count
    day: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    code: str
    commit: str
    evidence: Evidence
    complete: bool = True

    @property
    def rows(self) -> pd.DataFrame:
        """One row per point, with the columns of `Point`, and model, device, machine, code and evidence."""
        import pandas as pd

        subject = self.subject
        told = {
            "model": self.name,
            "device": subject.device,
            "machine": self.machine,
            "code": self.commit,
            "evidence": self.evidence,
        }
        names = list(Point.__dataclass_fields__)
        return pd.DataFrame([asdict(point) for point in self.points], columns=names).assign(**told)

    @property
    def machine(self) -> str:
        """The names of GPU and CPU."""
        gpus = self.subject.machine.get("gpus")
        names = [*(gpus if isinstance(gpus, list) else []), str(self.subject.machine.get("cpu"))]
        return f"{', '.join(names)}, {self.subject.threads} threads"

    def applied(self, hardware: HardwareSpec) -> HardwareSpec:
        """`hardware` with the thresholds, for placements and overlaps to see."""
        names = HardwareSpec.__dataclass_fields__
        measured = {name: value for name, value in asdict(self.crossovers).items() if name in names}
        return replace(hardware, **measured, calibrated=f"{self.day}, code {self.code}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as in the file, but for thresholds that are "never"."""
        found = asdict(self)
        found["crossovers"] = {k: "never" if v == NEVER else v for k, v in found["crossovers"].items()}
        return found

    def __str__(self) -> str:
        head = f"{self.name} on {self.machine}, device {self.subject.device} ({self.evidence}, {self.day})"
        most = max((point.tokens for point in self.points if point.kind == "prefill"), default=0)
        measured = f"{self.layers} MoE layers, prompts to {most:,} tokens"
        measured += "" if self.complete else "; interrupted, not kept"
        body = "\n".join(f"  {line}" for line in self.crossovers.lines())
        tables = "\n\n".join(filter(None, map(self._table, ("prefill", "decode"))))
        return f"{head}: {measured}\n{body}\n\n{tables}" if tables else f"{head}: {measured}\n{body}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _table(self, kind: str) -> str:
        rows: Any = self.rows
        rows = rows[rows["kind"] == kind]
        if not len(rows):
            return ""
        wide = rows.assign(path=[path_name(row) for row in rows.to_dict("records")])
        order = list(dict.fromkeys(wide["path"]))
        table = wide.pivot_table(index="tokens", columns="path", values="layer_s")[order] * 1e3
        unit = "tokens" if kind == "prefill" else "requests"
        return f"ms a layer over {unit}:\n" + table.rename_axis(index=None, columns=None).to_string(
            float_format="{:.3g}".format, na_rep=""
        )


def path_name(point: Mapping[str, Any]) -> str:
    """What a point's path is called in tables and figures."""
    if point["path"] != MIXED:
        return {CPU: "CPU experts", STREAMED: "streamed", PLAIN: "plain", DUAL: "dual batch"}[point["path"]]
    least = f", {point['min_tokens']}+" if point["min_tokens"] > 1 else ""
    return f"mixed {point['share']:.0%}{least}"


def _from(threshold: int, unit: str) -> str:
    return "never" if threshold == NEVER else f"from {threshold:,} {unit}"
