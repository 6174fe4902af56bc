from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hybridlab import backends, device_lock, provenance
from hybridlab.experiment import run
from hybridlab.plans import Lane, LaneKind, Op, Span, Tier
from hybridlab.request import Request, RequestRecord, Status
from hybridlab.serving import Served


class FakeBench:
    """One request at a time, 1 ms per prompt token and 10 ms per output token; counts what it served.

    Tests reach the class as `backends.BACKENDS["engine"]` and may set `hook`, which is called with (what, bench, number
    of requests or None) before it checks, loads or serves, and raises what they like.
    """

    log: list[str]
    hook: Callable[[str, FakeBench, int | None], None] = staticmethod(lambda what, bench, count: None)
    evidence = "measured"
    exclusive_device: str | None = None
    needs_checkpoint = True
    vocab = 1000

    def __init__(self, config: Any, checkpoint: Path, placement: Any, overlap: Any, quiet: bool) -> None:
        self.config = config
        self.loaded = False

    def check(self) -> None:
        self.hook("check", self, None)

    def load(self) -> None:
        assert not self.loaded
        self.hook("load", self, None)
        self.loaded = True
        self.log.append("open")

    def serve(self, requests: Sequence[Request], scheduler: Any, on_event: Callable[..., None]) -> Served:
        assert self.loaded
        self.hook("serve", self, len(requests))
        self.log.append(f"serve {type(scheduler).__name__} {len(requests)}")
        clock, records, spans = 0.0, [], []
        finished_s: dict[str, float] = {}
        for request in requests:
            arrival_s = request.arrival_s + (finished_s[request.after] if request.after else 0.0)
            start = max(clock, arrival_s)
            first = start + 0.001 * len(request.prompt)
            times = [first + 0.010 * i for i in range(request.max_tokens)]
            records.append(
                RequestRecord(
                    request,
                    Status.FINISHED,
                    [7] * len(times),
                    times,
                    start,
                    times[-1],
                    "length",
                    prompt=request.prompt,
                    arrival_s=arrival_s,
                )
            )
            finished_s[request.id] = times[-1]
            op = Op(len(spans), "experts", Lane("main", LaneKind.CPU), layer=0, tier=Tier.HOST)
            spans.append(Span(op, start, first))
            clock = times[-1]
            on_event(records[-1], 7)
        return Served(records, spans, clock, len(spans))

    def close(self) -> None:
        if self.loaded:
            self.loaded = False
            self.log.append("close")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Puts the fake backend in the engine's place, works in an empty folder, and returns the log of calls."""
    monkeypatch.setitem(backends.BACKENDS, "engine", FakeBench)
    monkeypatch.setattr(FakeBench, "log", [], raising=False)
    here = {"cpu": "test", "cores": 1, "isa": "none", "memory_gib": 1, "system": "test", "gpus": []}
    monkeypatch.setattr(provenance, "machine", lambda gpu=False: here)
    monkeypatch.setattr(device_lock, "lock_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    return FakeBench.log


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A config that the fake backend can run."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "fake"}))
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    return {
        "experiment": "question",
        "model": {"path": str(checkpoint)},
        "workload": {"kind": "offline", "num_requests": 3, "prompt_tokens": [2, 9], "output_tokens": 4},
    }


@pytest.fixture
def stored(bench: list[str], config: dict[str, Any]) -> list[Path]:
    """Two runs in the store."""
    return run({**config, "sweep": {"workload.num_requests": [1, 2]}}, progress=False).paths
