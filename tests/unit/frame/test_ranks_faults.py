"""A rank that is killed or hangs, wherever it is, ends the others with an error that names it, and all are started
again: each request has all of its tokens, and each token once. Nothing is left."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from faulty_rank import POINTS

import hybridlab as hl
from hybridlab.engine import ranks as ranks_module
from hybridlab.engine import ranks_lasting
from hybridlab.engine.ranks import Ranks
from hybridlab.errors import ConfigError, HybridlabError, StrategyError, WorkerLost
from hybridlab.plans import QueueView, StepPlan
from hybridlab.request import Status
from hybridlab.strategies.scheduler.chunked_prefill import ChunkedPrefill

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_bf16"
EXPECTED = json.loads((ORACLE / "expected.json").read_text())["requests"]
PATIENCE_S = 30.0
KILLED = r"rank {}: worker process \d+ was ended by SIGKILL; all {} ranks were stopped"
FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_rank.py")))


def load(ranks: int = 3, **options: Any) -> hl.Engine:
    return hl.load(ORACLE, ranks=ranks, **{"precision": "exact", "quiet": True, "kv_tokens": 1024, **options})


def runtime_of(engine: hl.Engine) -> Ranks:
    assert isinstance(engine.runtime, Ranks)
    return engine.runtime


def requests() -> list[hl.Request]:
    return [hl.Request(str(i), tuple(r["prompt"]), 24) for i, r in enumerate(EXPECTED)]


def is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_dead(pids: list[int]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not all(map(is_dead, pids)):
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def fail_at(tmp_path, monkeypatch):
    """Have a rank fail at a point, "once" or "always"; returns the plan, which is gone once that has happened."""

    def plan(rank: int, point: str, times: str = "once") -> Path:
        (tmp_path / "draft").write_text(f"{times} {point}")
        monkeypatch.setattr(ranks_module, "COMMAND", (*FAULTY, str(tmp_path / "plan"), str(rank)))
        return (tmp_path / "draft").rename(tmp_path / "plan")

    return plan


@dataclass(frozen=True)
class InTurn:
    """Chunked prefill; after each step of all ranks comes one of the first alone."""

    def schedule(self, queue: QueueView) -> StepPlan | None:
        step = ChunkedPrefill(5).schedule(queue)
        # A step that is lost changes nothing that is seen here, and so is on the same ranks again.
        alone = sum(request.context_tokens for request in (*queue.waiting, *queue.running)) % 2
        return step and replace(step, ranks=queue.rank_sets[alone])


def serve(engine: hl.Engine, scheduler: Any = "fcfs", **options: Any) -> list[hl.RequestRecord]:
    """All of the oracle's requests; what is told of their tokens is what they have, and all blocks return."""
    told: dict[str, list[int]] = {}
    given = options.pop("on_event", lambda record, token: None)

    def on_event(record, token):
        told.setdefault(record.request.id, []).append(token)
        given(record, token)

    pools, make = [], engine._pool
    engine._pool = lambda runtime: pools.append(make(runtime)) or pools[-1]  # type: ignore[method-assign]
    try:
        records = engine.serve(requests(), scheduler, on_event=on_event, **options).records
    finally:
        del engine._pool
    assert [pool.free_tokens for pool in pools] == [pools[0].num_blocks * pools[0].block_tokens]
    assert {record.request.id: record.output for record in records if record.output} == told
    return records


def check_whole(records: list[hl.RequestRecord]) -> None:
    assert {record.status for record in records} == {Status.FINISHED}
    assert [record.output for record in records] == [request["greedy"] for request in EXPECTED]


@pytest.mark.parametrize("point", ["setup", "ready"])
def test_a_rank_killed_while_it_starts_is_named(fail_at, point):
    fail_at(1, point)
    with pytest.raises(WorkerLost, match=KILLED.format(1, 2)):
        load(2)


@pytest.mark.parametrize(
    ("count", "victim", "points"),
    [
        (2, 1, [point for point in POINTS if point not in ("setup", "ready", "alone")]),
        (2, 0, ["alone"]),
        (3, 1, ["reduce"]),  # one of the others may be the first to see the second one go
        pytest.param(3, 1, ["keys"], marks=pytest.mark.slow),
    ],
)
def test_a_rank_killed_at_any_point_is_named_and_its_step_computed_once_more(fail_at, count, victim, points, caplog):
    fail_at(victim, points[0])
    with load(count) as engine:
        for number, point in enumerate(points):
            plan = fail_at(victim, point)
            before = runtime_of(engine).pids
            check_whole(serve(engine, InTurn()))
            assert not plan.exists() and not set(before) & set(runtime_of(engine).pids)
            wait_until_dead(before)
            assert len(re.findall(KILLED.format(victim, count) + "; starting others", caplog.text)) == number + 1
        last = runtime_of(engine).pids
        check_whole(serve(engine))
    wait_until_dead(last)


@pytest.mark.slow
def test_a_rank_killed_at_any_op_is_named_and_the_step_is_computed_once_more(fail_at, caplog):
    """Op after op, until a run completes untouched."""
    fail_at(1, "op:0")
    with load(2) as engine:
        for number in itertools.count():
            plan = fail_at(1, f"op:{number}")
            records = engine.serve([hl.Request("r", EXPECTED[3]["prompt"], 1)]).records
            assert records[0].output == EXPECTED[3]["greedy"][:1]
            if plan.exists():
                break
            assert len(re.findall(KILLED.format(1, 2) + "; starting", caplog.text)) == number + 1
    assert number == 16  # a rank's ops in the one step


def test_a_rank_that_hangs_is_named_once_the_others_have_waited(fail_at, monkeypatch, caplog):
    fail_at(2, "hang")
    monkeypatch.setattr(ranks_module, "TIMEOUT_S", 1.0)
    with load() as engine:
        before = runtime_of(engine).pids
        check_whole(serve(engine))
        wait_until_dead(before)
    assert re.search(r"rank 2 did not answer rank \d within 1 s; all 3 ranks were stopped; starting", caplog.text)


def test_what_fails_twice_fails_its_requests_and_what_always_does_ends_the_engine(fail_at):
    fail_at(1, "experts", "always")
    with load(2) as engine:
        first = runtime_of(engine).pids
        records = serve(engine)
        assert {record.status for record in records} == {Status.FAILED}
        assert all(re.search(KILLED.format(1, 2), record.error) for record in records)
        with pytest.raises(HybridlabError, match=KILLED.format(1, 2)):
            engine.generate([1, 2], 1)
        words = KILLED.format(1, 2) + "; started again 3 times without a step between them"
        for call in (lambda: engine.generate([1, 2], 1), lambda: engine.logits([1, 2]), runtime_of(engine).traffic):
            with pytest.raises(WorkerLost, match=words):
                call()
        wait_until_dead(first)


def test_ranks_that_cannot_start_again_are_named(fail_at, monkeypatch):
    monkeypatch.setattr(ranks_lasting, "MOST_STARTS", 2)
    fail_at(1, "none")
    with load(2) as engine:
        fail_at(1, "ready", "always")
        os.kill(runtime_of(engine).pids[0], signal.SIGKILL)
        with pytest.raises(WorkerLost, match=KILLED.format(1, 2) + "; started again 2 times"):
            engine.generate([1, 2], 1)


def test_a_rank_killed_between_steps_is_replaced():
    with load() as engine:
        before = runtime_of(engine).pids
        assert engine.generate(EXPECTED[2]["prompt"], 8) == EXPECTED[2]["greedy"][:8]
        os.kill(before[2], signal.SIGKILL)
        wait_until_dead(before)
        assert engine.generate(EXPECTED[2]["prompt"], 8) == EXPECTED[2]["greedy"][:8]
        assert len(set(runtime_of(engine).pids) - set(before)) == 3
        runtime_of(engine).traffic()


def test_tokens_before_a_loss_are_kept_and_each_is_told_once():
    """Killed with tokens of all requests told: those that were in the cache are computed again, with what they drew."""
    with load(2) as engine:
        pids, told = runtime_of(engine).pids, itertools.count(1)

        def kill_late(record, token):
            if next(told) == 40:
                os.kill(pids[1], signal.SIGKILL)
                wait_until_dead(pids)

        check_whole(serve(engine, on_event=kill_late))


def test_an_engine_is_closed_while_its_ranks_start_again():
    engine = load(2)
    pids = runtime_of(engine).pids
    os.kill(pids[0], signal.SIGKILL)
    wait_until_dead(pids)
    later = runtime_of(engine)._ranks
    engine.close()
    wait_until_dead(later.pids)
    with pytest.raises(HybridlabError, match="closed"):
        engine.generate([1, 2], 1)


_PARENT = """
import os, signal, sys
import hybridlab as hl
engine = hl.load(sys.argv[1], ranks=2, precision="exact", quiet=True, kv_tokens=256)
engine.generate([1, 2, 3], 2)
print(*engine.runtime.pids, flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["kill", "leave"])
def test_a_parent_takes_its_ranks_along_and_nothing_is_left(end):
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", _PARENT, str(ORACLE), end]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0)
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2
    wait_until_dead(pids)
    left = [name for name in set(os.listdir("/dev/shm")) - before if re.search("hybridlab|gloo|torch|nccl", name)]
    assert left == []


def test_ranks_listen_on_loopback_alone():
    with load(2) as engine:
        addresses = [address for pid in runtime_of(engine).pids for address in listening(pid)]
    assert addresses and set(addresses) == {"0100007F"}  # 127.0.0.1


def listening(pid: int) -> list[str]:
    """Local addresses, as /proc has them, of the sockets of a process that listen."""
    links = (os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd"))
    own = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().split("\n")[1:]
    ]
    return [row[1].partition(":")[0] for row in rows if row and row[3] == "0A" and row[9] in own]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ranks": 9}, ConfigError, "ranks is 9, expected an int from 1 to 8"),
        ({"ranks": True}, ConfigError, "ranks is True"),
        ({"ranks": 1, "exchange": "ring"}, ConfigError, "exchange is 'ring', expected one of small_ep"),
        ({"weight_layout": "tiles", "precision": "bf16"}, ConfigError, "expected 1 with weight_layout 'tiles'"),
        ({"worker": "thread"}, ConfigError, "each rank is a process"),
        (
            {"placement": {"name": "lru_cache", "gpu_gb": 1}, "device": "emulated"},
            StrategyError,
            "LruCache moves experts between steps, which several ranks",
        ),
    ],
)
def test_what_does_not_go_with_ranks_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        load(**{"ranks": 2, **options})


def test_an_opened_checkpoint_cannot_be_handed_on():
    with pytest.raises(ConfigError, match="needs the folder of a checkpoint"):
        hl.load(hl.open_checkpoint(ORACLE), ranks=2)


def test_routing_is_not_seen_with_ranks():
    with load(2) as engine, pytest.raises(StrategyError, match="on_route is for an engine without ranks"):
        engine.serve(requests(), on_route=lambda layer, entries, ids: None)
