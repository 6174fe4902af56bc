"""The loop between queue and backend: it sleeps while a step runs, and wakes when something happens."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hybridlab as hl
from hybridlab.engine.worker import EngineBackend
from hybridlab.errors import ConfigError, HybridlabError, RequestError
from hybridlab.request import Status

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_fp8_128"
STEP_S = 0.3


@pytest.fixture
def engine(monkeypatch):
    """An engine whose steps take a while, without holding the GIL."""
    with hl.load(ORACLE, precision="exact", quiet=True, kv_tokens=512) as engine:
        runtime: Any = engine.runtime
        model = runtime._executor._model
        head = model.head

        def slow(x_RH):
            time.sleep(STEP_S)
            return head(x_RH)

        monkeypatch.setattr(model, "head", slow)
        yield engine


def test_an_arrival_while_a_step_runs_is_no_reason_to_spin(engine, monkeypatch):
    waits = []
    whole = EngineBackend.wait
    monkeypatch.setattr(EngineBackend, "wait", lambda self, until_s: (waits.append(until_s), whole(self, until_s))[1])
    requests = [hl.Request("a", (1, 2), 2), hl.Request("b", (1, 2), 1, arrival_s=STEP_S / 3)]
    served = engine.serve(requests)
    assert [record.status for record in served.records] == [Status.FINISHED] * 2
    assert len(waits) <= served.num_steps + 2


def test_a_request_whose_time_is_up_before_a_worker_is_idle_is_never_started(engine):
    late = hl.Request("late", (1, 2), 2, arrival_s=STEP_S / 5, timeout_s=STEP_S / 5)
    record = engine.serve([hl.Request("a", (1, 2), 2), late]).records[1]
    assert (record.status, record.finish_reason, record.first_scheduled_s) == (Status.CANCELLED, "timeout", None)


def test_cancelling_wakes_an_idle_loop(engine):
    timer = threading.Timer(0.2, lambda: engine.cancel("far"))
    timer.start()
    served = engine.serve([hl.Request("far", (1,), 1, arrival_s=3600.0)])
    assert served.records[0].status is Status.CANCELLED and served.duration_s < 3600


def test_closing_ends_an_idle_loop(engine):
    timer = threading.Timer(0.2, engine.close)
    timer.start()
    with pytest.raises(HybridlabError, match="the engine was closed"):
        engine.serve([hl.Request("far", (1,), 1, arrival_s=3600.0)])
    timer.join()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": np.int64(5)}, "expected a sequence of token ids"),
        ({"sampling": None}, "sampling is None, expected hl.Sampling"),
        ({"after": ["good"]}, r"after is \['good'\], expected the id of another request"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_request_stops_no_other(fields, words):
    with hl.load(ORACLE, precision="exact", quiet=True, kv_tokens=512) as engine:
        bad = hl.Request(**{"id": "bad", "prompt": (1,), "max_tokens": 1, **fields})
        records = engine.serve([bad, hl.Request("good", (1, 2), 2)]).records
    assert records[0].status is Status.REJECTED and records[1].status is Status.FINISHED
    assert re.search(words, records[0].error)


@pytest.mark.parametrize("requests", [hl.Request("a", (1,), 1), None, ["x"]], ids=["one", "none", "texts"])
def test_what_is_no_list_of_requests_is_named(engine, requests):
    with pytest.raises(RequestError, match=r"expected a list of hl\.Request"):
        engine.serve(requests)
    with pytest.raises(ConfigError, match="keep_span_steps is -1"):
        engine.serve([], keep_span_steps=-1)
    with pytest.raises(RequestError, match="request id is 5, expected a text"):
        engine.serve([hl.Request(5, (1,), 1)])  # type: ignore[arg-type]
