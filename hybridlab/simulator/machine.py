"""A machine as numbers: every parameter with its unit, its default and where that comes from; profiles are data."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from math import inf, isfinite
from pathlib import Path
from typing import Any

from hybridlab.errors import ConfigError
from hybridlab.spec import HardwareSpec

PROFILES = files("hybridlab.simulator").joinpath("profiles")
ASSUMED = "assumed: no measurement behind it"
ALIKE = "1: alike"
ROOFLINE = "1: a roofline"
NO_LIMIT = "no limit is known"
NOT_COUNTED = "0: not counted"
OVERLAP = "share of the shorter one, of reading and multiplying, that hides behind the longer"
NARROW = "tokens that a weight is read for at the full rate"


def _parameter(
    unit: str, source: str, default: float | None = None, *, least: float = 0.0, above: bool = False, most: float = inf
) -> Any:
    """A field: `least` is allowed unless `above`, and `most`. Without a default, a profile must give it."""
    about = {"unit": unit, "source": source, "least": least, "above": above, "most": most}
    return field(metadata=about) if default is None else field(default=default, metadata=about)


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of a machine. 1 GB is 1e9 bytes; all rates are of one GPU, one link, the whole host.

    Numbers only, so that all of them can be arrays of configurations (see `step_maps`) or be differentiated.
    """

    host_memory_gb: float = _parameter("GB", "profile", above=True)
    host_peak_gb_s: float = _parameter("GB/s", "profile: channels x 8 bytes x MT/s", above=True)
    cpu_cores: float = _parameter("cores", "profile", least=1)
    cpu_tflops: float = _parameter("TFLOP/s, BF16 multiply-adds", "profile", above=True)
    gpu_memory_gb: float = _parameter("GB", "no GPU", 0.0)
    gpu_read_gb_s: float = _parameter("GB/s", "no GPU", 0.0)
    gpu_tflops: float = _parameter("TFLOP/s, dense BF16", "no GPU", 0.0)
    link_gb_s: float = _parameter("GB/s, host to GPU, as copies reach it", "no GPU", 0.0)
    num_gpus: float = _parameter("GPUs", "one or none", 1.0, least=0)
    host_read_efficiency: float = _parameter(
        "share of host_peak_gb_s", "OSDI '26: 947 of 1,228 GB/s in their FP8 GEMV", 0.77, above=True
    )
    host_shared_ratio: float = _parameter(
        "rate of CPU and link together / rate of the CPU alone", ASSUMED + " (both read the same DRAM)", 1.0, above=True
    )
    cpu_flop_efficiency: float = _parameter(
        "share of cpu_tflops", "README: 0.77 to 0.94 of the multiply ceiling over 16 to 2,048 rows", 0.85, above=True
    )
    cpu_dense_flop_ratio: float = _parameter("rate of dense ops / rate of experts, multiplying", ALIKE, 1.0, above=True)
    cpu_attention_flop_ratio: float = _parameter("the same of scores and values", ALIKE, 1.0, above=True)
    cpu_overlap: float = _parameter(OVERLAP, ROOFLINE, 1.0, most=1.0)
    cpu_narrow_tokens: float = _parameter(NARROW, NO_LIMIT, 1e9, above=True)
    cpu_wide_read: float = _parameter(
        "share of the read rate, dense weights of more tokens than that", ALIKE, 1.0, above=True
    )
    cpu_wide_expert_read: float = _parameter("the same of an expert with more tokens", ALIKE, 1.0, above=True)
    cpu_op_us: float = _parameter("us per op on the CPU's lane", ASSUMED, 10.0)
    cpu_expert_us: float = _parameter("us per distinct expert of a CPU op", ASSUMED, 0.0)
    gpu_read_efficiency: float = _parameter("share of gpu_read_gb_s", ASSUMED + " (usual for GEMV)", 0.8, above=True)
    gpu_flop_efficiency: float = _parameter("share of gpu_tflops", ASSUMED + " (usual for large GEMM)", 0.6, above=True)
    gpu_attention_efficiency: float = _parameter("share of gpu_tflops in scores and values", ASSUMED, 0.6, above=True)
    gpu_dense_flop_ratio: float = _parameter("rate of dense ops / rate of experts, multiplying", ALIKE, 1.0, above=True)
    gpu_overlap: float = _parameter(OVERLAP, ROOFLINE, 1.0, most=1.0)
    gpu_narrow_tokens: float = _parameter(NARROW, NO_LIMIT, 1e9, above=True)
    gpu_wide_read: float = _parameter(
        "share of the read rate, dense weights of more tokens than that", ALIKE, 1.0, above=True
    )
    gpu_wide_expert_read: float = _parameter("the same of an expert with more tokens", ALIKE, 1.0, above=True)
    gpu_dram_bytes: float = _parameter(
        "bytes of host DRAM per byte that the GPU reads", "0: memory of its own; 1: cores of the host (emulated)", 0.0
    )
    gpu_cores: float = _parameter("cores of the host in the GPU's place", "0: a GPU; above: emulated", 0.0)
    gpu_op_us: float = _parameter("us per op on the GPU's lane: its launches", ASSUMED, 10.0)
    gpu_expert_bytes: float = _parameter(
        "bytes moved in GPU memory per stored byte of an expert", "1: multiplied as stored; 5: FP8 widened to BF16", 1.0
    )
    link_latency_us: float = _parameter("us per copy", ASSUMED, 10.0)
    link_dram_bytes: float = _parameter("bytes of host DRAM per byte copied", "1: read once, by the GPU", 1.0)
    link_core_gb_s: float = _parameter(
        "GB/s that a core of the host copies, with gpu_cores", "0: copies take no core", 0.0
    )
    step_us: float = _parameter("us per step beside its ops: planned, handed to a worker, embedded", NOT_COUNTED, 0.0)
    row_us: float = _parameter("us per token that a step draws: gathered, sampled, told", NOT_COUNTED, 0.0)
    handoff_gpu_to_cpu_us: float = _parameter("us from a GPU queue to the CPU's lane", ASSUMED, 10.0)
    handoff_cpu_to_gpu_us: float = _parameter("us from the CPU's lane to a GPU queue", ASSUMED, 10.0)
    handoff_stream_us: float = _parameter("us between queues of a GPU (an event)", ASSUMED, 2.0)
    net_gb_s: float = _parameter("GB/s between GPUs, each", ASSUMED + " (through host memory)", 20.0, above=True)
    wire_bytes: float = _parameter("bytes per value between GPUs", "BF16; 4 for the float32 of the engine's ranks", 2.0)
    net_latency_us: float = _parameter("us per collective", ASSUMED, 30.0)

    @property
    def has_gpu(self) -> bool:
        return self.gpu_memory_gb > 0

    def check(self, name: str = "machine") -> None:
        """Raises `ConfigError` naming a parameter that is no finite number in its range, or a GPU without a rate."""
        for each in fields(self):
            value = getattr(self, each.name)
            least, above, most, unit = (each.metadata[key] for key in ("least", "above", "most", "unit"))
            number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            if not number or not least <= value <= most or (above and value == least):
                bound = f" and at most {most:g}" if most < inf else ""
                wanted = f"a finite number {'above' if above else 'of at least'} {least:g}{bound} ({unit})"
                raise ConfigError(f"{name}: {each.name} is {value!r}, expected {wanted}")
        for rate in ("gpu_read_gb_s", "gpu_tflops", "link_gb_s"):
            if self.has_gpu and getattr(self, rate) <= 0:
                raise ConfigError(f"{name}: {rate} is {getattr(self, rate)!r}, a GPU needs a rate above 0")

    def hardware(self, name: str, *, gpu: bool) -> HardwareSpec:
        """What strategies see of it."""
        return HardwareSpec(
            name=name,
            device="cpu" if not gpu else "emulated" if self.gpu_dram_bytes else "cuda",
            num_cores=int(self.cpu_cores),
            host_memory_bytes=int(self.host_memory_gb * 1e9),
            gpu_memory_bytes=int(self.gpu_memory_gb * 1e9) if gpu else 0,
            host_read_gb_s=self.host_peak_gb_s * self.host_read_efficiency,
            link_gb_s=self.link_gb_s if gpu else None,
            evidence="simulated",
        )


@dataclass(frozen=True)
class Profile:
    """A machine with a name, and for each of its parameters where the number comes from.

    `intervals`: of those that were fitted, the 95% interval.
    """

    name: str
    about: str
    machine: Machine
    sources: Mapping[str, str]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.about}"]
        for name, entry in profile_dict(self)["parameters"].items():
            spread = " ({:.4g} to {:.4g})".format(*entry["interval"]) if "interval" in entry else ""
            lines.append(f"  {name} {entry['value']:.4g}{spread} {entry['unit']}: {entry['source']}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{f.name}</td><td style='text-align:right'>{getattr(self.machine, f.name):g}</td>"
            f"<td style='text-align:left'>{f.metadata['unit']}</td>"
            f"<td style='text-align:left'>{self.sources[f.name]}</td></tr>"
            for f in fields(Machine)
        )
        head = "<tr><th>parameter</th><th>value</th><th>unit</th><th>source</th></tr>"
        return f"<p><b>{self.name}</b>: {self.about}</p><table>{head}{rows}</table>"


def profile_dict(profile: Profile) -> dict[str, Any]:
    """Plain data: `parameters` by name, each with value, unit, source and, where it was fitted, interval."""
    found = {}
    for each in fields(Machine):
        entry = {"value": getattr(profile.machine, each.name), "unit": each.metadata["unit"]}
        found[each.name] = entry | {"source": profile.sources[each.name]}
        if each.name in profile.intervals:
            found[each.name]["interval"] = list(profile.intervals[each.name])
    return {"name": profile.name, "about": profile.about, "parameters": found}


def profile_names() -> tuple[str, ...]:
    """The machines that come with hybridlab."""
    return tuple(sorted(Path(str(file)).stem for file in PROFILES.iterdir() if str(file).endswith(".toml")))


@cache
def _packaged(name: str) -> Profile:
    return parse_profile(PROFILES.joinpath(f"{name}.toml").read_text(encoding="utf-8"), name)


def load_profile(name: str | Path) -> Profile:
    """A machine by the name of a packaged profile, or by the path of a .toml file. Raises `ConfigError`."""
    if str(name) in profile_names():
        return _packaged(str(name))
    path = Path(name)
    if path.suffix != ".toml":
        raise ConfigError(f"machine {str(name)!r} is unknown, expected one of {', '.join(profile_names())} or a .toml")
    try:
        return parse_profile(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def parse_profile(text: str, name: str) -> Profile:
    """A profile from TOML: `about`, and each parameter as {value = ..., source = "..."}; raises `ConfigError`."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not TOML ({error})") from None
    about = data.pop("about", "")
    known = {each.name: each for each in fields(Machine)}
    values, sources = {}, {key: each.metadata["source"] for key, each in known.items()}
    intervals = {}
    for key, entry in data.items():
        if key not in known:
            raise ConfigError(f"{name}: unknown parameter {key!r}, expected one of {', '.join(known)}")
        if not isinstance(entry, dict) or set(entry) - {"interval"} != {"value", "source"} or not entry["source"]:
            raise ConfigError(f"{name}: {key} is {entry!r:.60}, expected {{value = NUMBER, source = TEXT}}")
        values[key], sources[key] = entry["value"], str(entry["source"])
        if "interval" in entry:
            intervals[key] = _interval(entry["interval"], f"{name}: {key}.interval")
    for key, each in known.items():
        if key not in values and each.default is MISSING:
            raise ConfigError(f"{name}: {key} is missing ({each.metadata['unit']})")
    machine = Machine(**values)
    machine.check(name)
    return Profile(name, str(about), machine, sources, intervals)


def _interval(given: Any, what: str) -> tuple[float, float]:
    numbers = isinstance(given, list) and len(given) == 2 and all(type(each) in (int, float) for each in given)
    if not numbers or not given[0] <= given[1] < float("inf"):
        raise ConfigError(f"{what} is {given!r:.60}, expected [low, high], finite")
    return float(given[0]), float(given[1])


def profile_text(profile: Profile, known: Collection[str]) -> str:
    """TOML that `parse_profile` reads: the parameters `known`; the others keep their defaults."""
    lines = [f"about = {json.dumps(profile.about)}", ""]
    for each in fields(Machine):
        if each.name in known:
            told = (
                f"value = {getattr(profile.machine, each.name):.6g}, source = {json.dumps(profile.sources[each.name])}"
            )
            if each.name in profile.intervals:
                low, high = profile.intervals[each.name]
                told += f", interval = [{low:.6g}, {high:.6g}]"
            lines.append(f"{each.name} = {{ {told} }}  # {each.metadata['unit']}")
    return "\n".join(lines) + "\n"
