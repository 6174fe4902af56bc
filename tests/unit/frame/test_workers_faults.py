"""Workers that are killed at every point of their protocol: each request has all of its tokens, and each token once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from test_worker_faults import GREEDY, ORACLE, PATIENCE_S, is_dead, requests, wait_until

import hybridlab as hl
from hybridlab.engine import gpu_copy, remote_worker, workers
from hybridlab.engine.workers import Workers
from hybridlab.hardware.gpu import Gpu
from hybridlab.request import Status

PAPER = {"name": "paper", "short_tokens": 7, "chunk_tokens": 4}
"""Two of the oracle's prompts are computed on the decode worker, three on the other."""


class Engine:
    """An engine whose workers fail where they are told to."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self._numbers = folder, count(1)
        self.plan("nobody", "step", 0, 0)
        given = {"precision": "exact", "quiet": True, "kv_tokens": 512, "workers": {"prefill": {}, "decode": {}}}
        self.engine = hl.load(ORACLE, **{**given, **options})
        assert isinstance(self.engine.runtime, Workers)
        self.runtime = self.engine.runtime

    def plan(self, worker: str, point: str, times: int = 0, fires: int = 1) -> None:
        self._now = next(self._numbers)
        draft = self.folder / "draft"
        draft.write_text(f"{self._now}|{worker}|{point}|{times}|{fires}")
        draft.rename(self.folder / "plan")

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in (self.folder / "pids").read_text().split()]

    @property
    def num_failed(self) -> int:
        failed = self.folder / "failed"
        return failed.read_text().split().count(str(self._now)) if failed.exists() else 0

    def serve(self, **options: Any) -> list[hl.RequestRecord]:
        """All of the oracle's requests; what is told of their tokens is what they have, and all blocks return."""
        told: dict[str, list[int]] = {}
        given = options.pop("on_event", lambda record, token: None)

        def on_event(record, token):
            told.setdefault(record.request.id, []).append(token)
            given(record, token)

        taken, make = [], self.runtime.pools
        self.runtime.pools = lambda: taken.append(make()) or taken[0]  # type: ignore[method-assign]
        try:
            records = self.engine.serve(requests(), PAPER, on_event=on_event, **options).records
        finally:
            del self.runtime.pools
        assert {r.request.id: r.output for r in records if r.output} == told
        assert all(len(record.output) == len(record.token_times_s) for record in records)
        for pool in (*taken[0].pools.values(), taken[0].transfer):
            assert pool.free_tokens == pool.num_blocks * pool.block_tokens
        return records


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    """Afterwards no process that was started is left, and nothing in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    script = Path(__file__).with_name("faulty_workers.py")
    folder = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_worker, "COMMAND", (sys.executable, "-P", str(script), str(folder)))
        patch.setitem(workers.PIECE_BYTES, "cpu", 1)  # a block at a time, beside others
        faulty = Engine(folder)
        try:
            yield faulty
        finally:
            faulty.engine.close()
    assert [pid for pid in faulty.pids if not is_dead(pid)] == []
    assert {name for name in set(os.listdir("/dev/shm")) - before if "hybridlab" in name} == set()


def check_all_finished(records) -> None:
    assert [record.error for record in records] == [""] * len(records)
    assert [(record.status, record.output) for record in records] == [(Status.FINISHED, tokens) for tokens in GREEDY]


FAULTS = [
    ("prefill", "step", 0),
    ("prefill", "op", 3),
    ("prefill", "computed", 0),
    ("prefill", "answered", 0),
    ("prefill", "leave", 0),
    ("prefill", "half left", 1),
    ("prefill", "left", 0),
    ("decode", "step", 5),
    ("decode", "op", 95),
    ("decode", "computed", 3),
    ("decode", "half an answer", 4),
    ("decode", "answered", 6),
    ("decode", "take", 1),
    ("decode", "half taken", 0),
    ("decode", "taken", 0),
]


@pytest.mark.parametrize(("worker", "point", "times"), FAULTS)
def test_a_killed_worker_costs_no_token_and_repeats_none(engine, caplog, worker, point, times):
    number = len(engine.pids)
    engine.plan(worker, point, times)
    check_all_finished(engine.serve())
    assert engine.num_failed == 1
    wait_until(lambda: None not in engine.runtime.pids.values())
    assert len(engine.pids) == number + 1 and "starting another" in caplog.text
    check_all_finished(engine.serve())


def test_a_killed_worker_on_a_gpu_costs_no_token(tmp_path, monkeypatch):
    """Both workers are told that there is one. They compute in BF16, so the drawn tokens are their own."""
    gpus = (Gpu(0, "made up", 2**34, (9, 0)),)
    for module in ("engine.options", "loading", "hardware.detect"):
        monkeypatch.setattr(import_module(f"hybridlab.{module}"), "detect_gpus", lambda: gpus)
    script = Path(__file__).with_name("faulty_workers.py")
    monkeypatch.setattr(remote_worker, "COMMAND", (sys.executable, "-P", str(script), str(tmp_path)))
    monkeypatch.setitem(workers.PIECE_BYTES, "cuda", 1)
    monkeypatch.setattr(gpu_copy, "can_share", lambda index: True)
    tmp_path.joinpath("cuda").touch()
    both = {"prefill": {"threads": 2}, "decode": {"threads": 2}}
    streamed = {"name": "streamed", "stream_from_tokens": 6}
    faulty = Engine(tmp_path, device="cuda", precision="bf16", placement=streamed, workers=both)
    with faulty.engine:
        points = [("prefill", "half left", 1), ("prefill", "op", 3), ("decode", "half taken", 0), ("decode", "op", 95)]
        for number, (worker, point, times) in enumerate(points, 3):
            faulty.plan(worker, point, times)
            records = faulty.serve()
            told = [(record.status, record.error, len(record.output)) for record in records]
            assert told == [(Status.FINISHED, "", len(tokens)) for tokens in GREEDY]
            assert faulty.num_failed == 1
            wait_until(lambda: None not in faulty.runtime.pids.values())
            assert len(faulty.pids) == number
    assert [pid for pid in faulty.pids if not is_dead(pid)] == []


def test_what_does_not_arrive_as_it_was_left_is_computed_again(engine, caplog):
    number = len(engine.pids)
    engine.plan("decode", "garbled")
    check_all_finished(engine.serve())
    assert engine.num_failed == 1 and len(engine.pids) == number
    assert "HandOffRefused: KV hand-off" in caplog.text and ": step is " in caplog.text


def test_a_request_that_is_lost_twice_fails_and_others_finish(engine):
    """A prompt is lost on the way out of both processes that computed it."""
    engine.plan("prefill", "leave", 0, fires=2)
    records = engine.serve()
    assert engine.num_failed == 2
    failed = [record for record in records if record.status is Status.FAILED]
    assert failed and all("was ended by SIGKILL" in record.error and not record.output for record in failed)
    for record, tokens in zip(records, GREEDY, strict=True):
        assert record in failed or (record.status, record.output) == (Status.FINISHED, tokens)
    check_all_finished(engine.serve())


@pytest.mark.parametrize("worker", ["prefill", "decode"])
def test_a_worker_that_is_killed_from_outside_between_two_tokens(engine, worker):
    engine.plan("nobody", "step", 0, 0)
    pid = engine.runtime.pids[worker]

    def kill(record, token):
        if sum(map(len, told)) == 12:
            os.kill(pid, signal.SIGKILL)
        told.append((token,))

    told: list[tuple[int, ...]] = []
    check_all_finished(engine.serve(on_event=kill))
    wait_until(lambda: engine.runtime.pids[worker] not in (pid, None))


def test_an_interrupt_leaves_the_engine_usable(engine):
    engine.plan("nobody", "step", 0, 0)
    pids = dict(engine.runtime.pids)
    for after in (1, 7):
        left = count(1)

        def interrupt(record, token, left=left, after=after):
            if next(left) == after:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            engine.engine.serve(requests(), PAPER, on_event=interrupt)
        check_all_finished(engine.serve())
    assert engine.runtime.pids == pids


def test_cancelled_and_late_requests_free_what_lies_between_the_workers(engine):
    engine.plan("nobody", "step", 0, 0)

    def cancel(record, token):
        if record.request.id in ("3", "4") and len(record.output) == 1:
            engine.engine.cancel(record.request.id)

    records = engine.serve(on_event=cancel)
    assert [record.status for record in records] == [Status.FINISHED] * 3 + [Status.CANCELLED] * 2
    check_all_finished(engine.serve())


PARENT = f"""
import time
import hybridlab as hl
engine = hl.load({str(ORACLE)!r}, quiet=True, kv_tokens=512, workers={{"prefill": {{}}, "decode": {{}}}})
print(*engine.runtime.pids.values(), flush=True)
time.sleep(600)
"""


def test_a_killed_parent_takes_its_workers_along():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and not any(map(is_dead, pids))
        parent.kill()
        parent.wait(PATIENCE_S)
        for pid in pids:
            wait_until(lambda pid=pid: is_dead(pid))


def test_an_engine_that_nobody_holds_takes_its_processes_along():
    engine = hl.load(ORACLE, quiet=True, kv_tokens=512, workers={"prefill": {}, "decode": {}})
    assert isinstance(engine.runtime, Workers)
    pids = list(engine.runtime.pids.values())
    del engine
    for pid in pids:
        wait_until(lambda pid=pid: is_dead(pid or 0))


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["prefill", "decode"])
@pytest.mark.parametrize("point", ["step", "computed", "answered"])
def test_a_worker_is_killed_at_every_step(engine, worker, point):
    for times in count():
        engine.plan(worker, point, times)
        check_all_finished(engine.serve(token_budget=20))  # so that prompts take some steps
        if engine.num_failed == 0:
            assert times > 3
            return
        wait_until(lambda: None not in engine.runtime.pids.values())
