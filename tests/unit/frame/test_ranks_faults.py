"""A rank that is killed or hangs, wherever it is, ends the others with an error that names it; nothing is left."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from faulty_rank import POINTS

import hybridlab as hl
from hybridlab.engine import ranks as ranks_module
from hybridlab.engine.ranks import Ranks
from hybridlab.errors import ConfigError, StrategyError, WorkerLost
from hybridlab.request import Status

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


@pytest.mark.parametrize("point", [point for point in POINTS if point in ("setup", "ready")])
def test_a_rank_killed_while_it_starts_is_named(monkeypatch, point):
    monkeypatch.setattr(ranks_module, "COMMAND", (*FAULTY, "1", point))
    with pytest.raises(WorkerLost, match=KILLED.format(1, 2)):
        load(2)


@pytest.mark.parametrize("point", [point for point in POINTS if point not in ("setup", "ready")])
def test_a_rank_killed_at_any_point_of_a_step_is_named(monkeypatch, point):
    monkeypatch.setattr(ranks_module, "COMMAND", (*FAULTY, "1", point))
    # With a third rank, one of the others may be the first to see the second one go.
    ranks = 3 if point in ("keys", "reduce") else 2
    with load(ranks) as engine:
        check_lost(engine, runtime_of(engine).pids, KILLED.format(1, ranks))


@pytest.mark.slow
def test_a_rank_killed_at_any_op_is_named(monkeypatch):
    """Op after op, until a run completes untouched."""
    for number in itertools.count():
        monkeypatch.setattr(ranks_module, "COMMAND", (*FAULTY, "1", f"op:{number}"))
        with load(2) as engine:
            pids = runtime_of(engine).pids
            served = engine.serve([hl.Request("r", EXPECTED[3]["prompt"], 1)])
            if served.records[0].status is not Status.FAILED:
                break
            assert re.search(KILLED.format(1, 2), served.records[0].error)
            wait_until_dead(pids)
    assert number == 16  # a rank's ops in the one step
    assert served.records[0].output == EXPECTED[3]["greedy"][:1]


def test_a_rank_that_hangs_is_named_once_the_others_have_waited(monkeypatch):
    monkeypatch.setattr(ranks_module, "COMMAND", (*FAULTY, "2", "hang"))
    monkeypatch.setattr(ranks_module, "TIMEOUT_S", 1.0)
    with load() as engine:
        check_lost(engine, runtime_of(engine).pids, r"rank 2 did not answer rank \d within 1 s")


def check_lost(engine: hl.Engine, pids: list[int], words: str) -> None:
    """The first step fails, with all its requests; the ranks end, and the engine says why from then on."""
    served = engine.serve(requests())
    assert {record.status for record in served.records} == {Status.FAILED}
    assert all(re.search(words, record.error) for record in served.records)
    wait_until_dead(pids)
    with pytest.raises(WorkerLost, match=words):
        engine.generate([1, 2], 1)


def test_a_rank_killed_between_steps_ends_the_engine():
    with load() as engine:
        pids = runtime_of(engine).pids
        assert engine.generate(EXPECTED[2]["prompt"], 8) == EXPECTED[2]["greedy"][:8]
        os.kill(pids[2], signal.SIGKILL)
        wait_until_dead(pids)
        with pytest.raises(WorkerLost, match="rank 2: worker process"):
            engine.generate(EXPECTED[2]["prompt"], 8)
        with pytest.raises(WorkerLost, match="rank 2: worker process"):
            runtime_of(engine).traffic()


def test_tokens_before_a_loss_are_right_and_requests_that_come_later_see_it():
    given = [*requests(), hl.Request("later", (1, 2), 4, arrival_s=3600.0)]
    outputs: dict[str, list[int]] = {}
    with load(2) as engine:

        def kill_late(record, token):
            outputs.setdefault(record.request.id, []).append(token)
            if sum(map(len, outputs.values())) == 40:
                os.kill(runtime_of(engine).pids[0], signal.SIGKILL)

        with pytest.raises(WorkerLost, match="rank 0: worker process"):
            engine.serve(given, on_event=kill_late)
    assert len(outputs) == len(EXPECTED)
    for i, request in enumerate(EXPECTED):
        output = outputs[str(i)]
        assert output == request["greedy"][: len(output)] and len(output) < 24


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
