"""What is asked of the system: a workload is arrivals and lengths; token ids are seeded per request.

Two schedulers given the same workload see the same prompts: the ids of request i depend on (seed, i) alone.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from hybridlab.errors import ConfigError
from hybridlab.request import Request, Sampling
from hybridlab.sections import Section

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _range(value: Any) -> Any:
    pair = (value, value) if isinstance(value, int) else value
    whole = isinstance(pair, list | tuple) and all(type(n) is int for n in pair)
    if not whole or len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"expected a positive number of tokens or [low, high] with 1 <= low <= high, got {value!r}")
    return tuple(pair)


Count = Annotated[int, Field(gt=0)]
Lengths = Annotated[tuple[int, int], BeforeValidator(_range)]
"""Tokens: one number for all requests, or [low, high] for uniform lengths, both ends included."""


class SamplingConfig(Section):
    """How output tokens are drawn; greedy by default. Request seeds follow from the workload's."""

    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


class _Common(Section):
    """Keys of every workload.

    Lengths are first divided by `length_scale` (outputs by `output_length_scale` if given) and rounded up, so
    that a small machine can serve a trace, then clipped at `max_prompt_tokens` and `max_output_tokens`. No
    stop tokens are set, so an output is shorter only if the model draws its own eos token.
    """

    num_requests: int = Field(gt=0, le=1_000_000)
    length_scale: float = Field(default=1.0, gt=0)
    output_length_scale: float | None = Field(default=None, gt=0)
    max_prompt_tokens: Count | None = None
    max_output_tokens: Count | None = None
    seed: int = Field(default=0, ge=0)
    sampling: SamplingConfig = SamplingConfig()

    def _shape(self, prompt: float, output: float) -> tuple[int, int]:
        lengths = []
        for tokens, scale, limit in (
            (prompt, self.length_scale, self.max_prompt_tokens),
            (output, self.output_length_scale or self.length_scale, self.max_output_tokens),
        ):
            scaled = max(1, math.ceil(tokens / scale))
            lengths.append(min(scaled, limit) if limit else scaled)
        return lengths[0], lengths[1]


class AzureWorkload(_Common):
    """Rows `start` to `start + num_requests` of a trace (TIMESTAMP, ContextTokens, GeneratedTokens).

    Times between arrivals are divided by `rate_scale`: 10 replays the trace ten times faster.
    """

    kind: Literal["azure"]
    path: str
    start: int = Field(default=0, ge=0)
    rate_scale: float = Field(default=1.0, gt=0)


class PoissonWorkload(_Common):
    """Arrivals with exponential gaps at `rate_req_s` requests/s; the first comes after one gap."""

    kind: Literal["poisson"]
    rate_req_s: float = Field(gt=0)
    prompt_tokens: Lengths
    output_tokens: Lengths


class OfflineWorkload(_Common):
    """Every request is there at time 0."""

    kind: Literal["offline"]
    prompt_tokens: Lengths
    output_tokens: Lengths


Workload = Annotated[AzureWorkload | PoissonWorkload | OfflineWorkload, Field(discriminator="kind")]
WORKLOAD_KINDS = ("azure", "poisson", "offline")


def load_rows(workload: AzureWorkload | PoissonWorkload | OfflineWorkload, base: Path) -> list[tuple[float, int, int]]:
    """Arrival (s), prompt and output tokens of each request, before lengths are scaled and clipped."""
    if isinstance(workload, AzureWorkload):
        return _azure_rows(workload, base)
    return _synthetic_rows(workload)


def make_requests(
    workload: AzureWorkload | PoissonWorkload | OfflineWorkload, vocab: int, *, base: Path | None = None
) -> list[Request]:
    """The requests in arrival order, ids "r00000" and up; prompts are uniform over [0, vocab).

    Relative trace paths start at `base` (default: the working directory). Raises ConfigError naming the trace
    file, the line or the column, and what was expected.
    """
    requests = []
    for index, (arrival_s, prompt, output) in enumerate(load_rows(workload, base or Path())):
        prompt_tokens, output_tokens = workload._shape(prompt, output)
        rng = np.random.default_rng([workload.seed, index])
        ids = tuple(rng.integers(0, vocab, prompt_tokens).tolist())
        requests.append(
            Request(
                id=f"r{index:05d}",
                prompt=ids,
                max_tokens=output_tokens,
                arrival_s=arrival_s,
                sampling=Sampling(seed=int(rng.integers(2**31)), **workload.sampling.model_dump()),
            )
        )
    return requests


def warmup_requests(requests: Sequence[Request], count: int, vocab: int) -> list[Request]:
    """`count` requests with the lengths of the first ones, all at time 0, with other token ids.

    Other ids, so that a warm-up can never fill a prefix cache for the measured requests.
    """
    result = []
    for index in range(count):
        like = requests[index % len(requests)]
        rng = np.random.default_rng([0x3A3A, index])
        ids = tuple(rng.integers(0, vocab, len(like.prompt)).tolist())
        result.append(Request(id=f"warmup{index:05d}", prompt=ids, max_tokens=like.max_tokens))
    return result


def _synthetic_rows(workload: PoissonWorkload | OfflineWorkload) -> list[tuple[float, int, int]]:
    # A stream of its own ("arrivals and lengths"), apart from the per-request streams of token ids.
    rng = np.random.default_rng([workload.seed, 0, 1])
    n = workload.num_requests
    arrivals = np.zeros(n)
    if isinstance(workload, PoissonWorkload):
        arrivals = np.cumsum(rng.exponential(1 / workload.rate_req_s, n))

    def draw(lengths: tuple[int, int]) -> list[int]:
        return rng.integers(*lengths, n, endpoint=True).tolist()

    return list(zip(arrivals.tolist(), draw(workload.prompt_tokens), draw(workload.output_tokens), strict=True))


def _azure_rows(workload: AzureWorkload, base: Path) -> list[tuple[float, int, int]]:
    path = base / workload.path
    last = workload.start + workload.num_requests
    rows: list[tuple[float, int, int]] = []
    origin: datetime | None = None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in AZURE_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path}: no column {missing[0]!r}; expected {', '.join(AZURE_COLUMNS)}")
            for index, row in enumerate(reader):
                if index >= last:
                    break
                if index < workload.start:
                    continue
                time, prompt, output = _azure_row(row, f"{path}: line {reader.line_num}")
                origin = origin or time
                arrival_s = (time - origin).total_seconds() / workload.rate_scale
                if arrival_s < (rows[-1][0] if rows else 0.0):
                    raise ConfigError(f"{path}: line {reader.line_num}: TIMESTAMP goes back; expected arrival order")
                rows.append((arrival_s, prompt, output))
    except OSError as error:
        raise ConfigError(f"workload.path: {path}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: not a CSV text file ({error})") from None
    if len(rows) < workload.num_requests:
        raise ConfigError(
            f"{path}: {workload.start + len(rows)} rows; workload.start + num_requests asks for {last}"
            if rows
            else f"{path}: no row {workload.start}; workload.start + num_requests asks for {last} rows"
        )
    return rows


def _azure_row(row: dict[str, Any], where: str) -> tuple[datetime, int, int]:
    try:
        # The traces have seven decimals of a second; datetime takes six.
        time = datetime.fromisoformat((row["TIMESTAMP"] or "")[:26])
    except ValueError:
        raise ConfigError(f"{where}: TIMESTAMP {row['TIMESTAMP']!r}: expected YYYY-MM-DD HH:MM:SS") from None
    lengths = []
    for name in AZURE_COLUMNS[1:]:
        text = row[name] or ""
        if not text.strip().isdigit() or int(text) < 1:
            raise ConfigError(f"{where}: {name} {text!r}: expected a positive whole number")
        lengths.append(int(text))
    return time, lengths[0], lengths[1]
