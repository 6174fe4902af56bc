"""Latency and throughput with the names and definitions of `vllm bench serve`, in seconds and tokens/s.

Only finished requests enter latencies and throughput, as there. Where that tool prints 0 for "no data",
these functions give NaN. Percentiles interpolate linearly (numpy's default), as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, ValidationError

from hybridlab.errors import ConfigError
from hybridlab.request import RequestRecord, Status
from hybridlab.sections import Section, did_you_mean, one_line

if TYPE_CHECKING:
    import pandas as pd

DEFINITIONS = {
    "ttft_s": "first token - arrival (queue time included)",
    "queue_s": "first scheduled - arrival",
    "tpot_s": "(e2el - ttft) / (output tokens - 1); requests with one output token have none",
    "itl_s": "every gap between consecutive output tokens of a request, zero gaps included",
    "e2el_s": "last token - arrival",
    "duration_s": "start of the run to the last finish",
    "request_throughput_req_s": "finished requests / duration",
    "output_tokens_per_s": "output tokens of finished requests / duration",
    "total_tokens_per_s": "prompt and output tokens of finished requests / duration",
    "request_goodput_req_s": "finished requests with ttft <= slo_ttft_s and tpot <= slo_tpot_s / duration "
    "(a request without tpot meets any tpot)",
    "offered_req_s": "(requests that arrived - 1) / (last arrival - first arrival)",
    "saturated": "finished requests/s are below offered requests/s by more than 10% and more than chance "
    "(1/sqrt(requests)), each between the 10th and 90th percentile of its times: more is offered than completes, and "
    "latencies grow with the length of the run",
    "prefix_hit_rate": "prompt tokens of finished requests that were found in the KV cache / their prompt tokens",
    "aggregates": "mean, median, p90, p99 over finished requests (itl: over all gaps), linear interpolation",
}


class SLO(Section):
    """A service level: the most that TTFT and TPOT of a request may take, in seconds."""

    name: str = "custom"
    ttft_s: float = Field(gt=0)
    tpot_s: float = Field(gt=0)

    def __str__(self) -> str:
        return f"{self.name}: TTFT ≤ {self.ttft_s:g} s, TPOT ≤ {self.tpot_s * 1000:g} ms"


SLO_PRESETS = {
    slo.name: slo
    for slo in (
        SLO(name="paper", ttft_s=30.0, tpot_s=0.050),  # CPU-GPU hybrid design, OSDI '26
        SLO(name="mlperf-r1-server", ttft_s=2.0, tpot_s=0.080),  # MLPerf Inference, DeepSeek-R1
        SLO(name="mlperf-r1-interactive", ttft_s=1.5, tpot_s=0.015),
    )
}


def find_slo(value: str | SLO | Mapping[str, Any]) -> SLO:
    """The SLO itself, one of such keys, or the preset of that name. Raises ConfigError for anything else."""
    if isinstance(value, SLO):
        return value
    if isinstance(value, Mapping):
        try:
            return SLO.model_validate(value)
        except ValidationError as error:
            raise ConfigError(f"slo: {one_line(error)}") from None
    if not isinstance(value, str):
        raise ConfigError(f"slo: expected one of {', '.join(SLO_PRESETS)} or {{ttft_s, tpot_s}}, got {value!r:.60}")
    if value not in SLO_PRESETS:
        raise ConfigError(f"slo: unknown preset {value!r}" + did_you_mean(str(value), SLO_PRESETS))
    return SLO_PRESETS[value]


def requests_frame(records: Iterable[RequestRecord]) -> pd.DataFrame:
    """One row per request; times in seconds since the start of the run, NaN where undefined.

    `token_times_s` and `output_ids` hold lists. Latencies are filled for finished requests only.
    """
    import pandas as pd

    frame = pd.DataFrame([_row(record) for record in records], columns=list(REQUEST_COLUMNS))
    return frame.astype(REQUEST_COLUMNS)


REQUEST_COLUMNS: dict[str, Any] = {
    "request_id": "object",
    "status": "object",
    "finish_reason": "object",
    "error": "object",
    "arrival_s": "float64",
    "prompt_tokens": "int64",
    "cached_tokens": "int64",
    "max_tokens": "int64",
    "output_tokens": "int64",
    "first_scheduled_s": "float64",
    "first_token_s": "float64",
    "finished_s": "float64",
    "queue_s": "float64",
    "ttft_s": "float64",
    "tpot_s": "float64",
    "e2el_s": "float64",
    "token_times_s": "object",
    "output_ids": "object",
}


def _row(record: RequestRecord) -> dict[str, Any]:
    nan = float("nan")
    request, times = record.request, [float(t) for t in record.token_times_s]
    finished = record.status is Status.FINISHED
    arrival_s = nan if record.arrival_s is None else float(record.arrival_s)
    ttft = times[0] - arrival_s if finished and times else nan
    e2el = times[-1] - arrival_s if finished and times else nan
    first = record.first_scheduled_s
    return {
        "request_id": request.id,
        "status": str(record.status),
        "finish_reason": record.finish_reason,
        "error": record.error,
        "arrival_s": arrival_s,
        "prompt_tokens": len(record.prompt),
        "cached_tokens": record.cached_tokens,
        "max_tokens": request.max_tokens,
        "output_tokens": len(record.output),
        "first_scheduled_s": nan if first is None else first,
        "first_token_s": times[0] if times else nan,
        "finished_s": nan if record.finished_s is None else record.finished_s,
        "queue_s": first - arrival_s if finished and first is not None else nan,
        "ttft_s": ttft,
        "tpot_s": (e2el - ttft) / (len(times) - 1) if len(times) > 1 else nan,
        "e2el_s": e2el,
        "token_times_s": times,
        "output_ids": [int(token) for token in record.output],
    }


def summarise(
    requests: pd.DataFrame | Iterable[RequestRecord], duration_s: float, slo: str | SLO = "paper"
) -> dict[str, Any]:
    """Counts, rates and latency aggregates of one run; see DEFINITIONS.

    `requests` is a `requests_frame` or records; `duration_s` runs from the start to the last finish. Rates
    are NaN for a duration of zero. Raises ConfigError for an unknown SLO preset.
    """
    import pandas as pd

    slo = find_slo(slo)
    frame = requests if isinstance(requests, pd.DataFrame) else requests_frame(requests)
    status, arrival_s = frame["status"].to_numpy(str), frame["arrival_s"].to_numpy(np.float64)
    done = status == str(Status.FINISHED)

    def column(name: str) -> np.ndarray:
        return frame[name].to_numpy(np.float64)[done]

    def rate(count: int) -> float:
        return count / duration_s if duration_s > 0 else float("nan")

    ttft_s, tpot_s = column("ttft_s"), column("tpot_s")
    good = (ttft_s <= slo.ttft_s) & ~(tpot_s > slo.tpot_s)
    times = frame["token_times_s"].to_numpy(object)[done]
    gaps = [np.diff(np.asarray(request_times, dtype=np.float64)) for request_times in times]
    finished_s, was_refused = column("finished_s"), status == str(Status.REJECTED)
    saturated = is_saturated(arrival_s[~was_refused & ~np.isnan(arrival_s)], finished_s)
    arrival_s = arrival_s[~np.isnan(arrival_s)]  # some never arrive: the turn before them did not end well
    span_s = float(np.ptp(arrival_s)) if len(arrival_s) else 0.0
    inputs, outputs = int(column("prompt_tokens").sum()), int(column("output_tokens").sum())
    cached = int(column("cached_tokens").sum())
    unfinished = (Status.FAILED, Status.REJECTED, Status.CANCELLED)
    result: dict[str, Any] = {
        "num_requests": len(status),
        "completed": int(done.sum()),
        **{str(name): int((status == str(name)).sum()) for name in unfinished},
        "duration_s": float(duration_s),
        "offered_req_s": (len(arrival_s) - 1) / span_s if span_s > 0 else float("nan"),
        "saturated": saturated,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "cached_prompt_tokens": cached,
        "prefix_hit_rate": cached / inputs if inputs else float("nan"),
        "request_throughput_req_s": rate(int(done.sum())),
        "output_tokens_per_s": rate(outputs),
        "total_tokens_per_s": rate(inputs + outputs),
        "request_goodput_req_s": rate(int(good.sum())),
        "slo": slo.name,
        "slo_ttft_s": slo.ttft_s,
        "slo_tpot_s": slo.tpot_s,
    }
    for name in ("ttft_s", "tpot_s", "e2el_s", "queue_s"):
        result |= _aggregates(name, column(name))
    return result | _aggregates("itl_s", np.concatenate(gaps) if gaps else np.empty(0))


def is_saturated(arrival_s: np.ndarray, finished_s: np.ndarray) -> bool:
    """Whether requests arrive faster than they finish, by DEFINITIONS; false where all arrive at once.

    Times in seconds, those of requests that never finished left out of `finished_s` alone. Between percentiles, so that
    neither a server that is still empty nor the last requests that it works off count.
    """
    if len(arrival_s) < 2:
        return False
    arriving_s = float(np.subtract(*np.percentile(arrival_s, (90, 10))))
    if arriving_s <= 0:
        return False
    finishing_s = float(np.subtract(*np.percentile(finished_s, (90, 10)))) if len(finished_s) > 1 else inf
    completes = len(finished_s) / len(arrival_s) * arriving_s / finishing_s if finishing_s > 0 else inf
    return bool(completes < 1 - max(0.1, len(arrival_s) ** -0.5))


def _aggregates(name: str, values: np.ndarray) -> dict[str, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return {f"{kind}_{name}": float("nan") for kind in ("mean", "median", "p90", "p99")}
    median, p90, p99 = np.percentile(values, (50, 90, 99))
    return {
        f"mean_{name}": float(values.mean()),
        f"median_{name}": float(median),
        f"p90_{name}": float(p90),
        f"p99_{name}": float(p99),
    }
