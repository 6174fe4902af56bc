"""What notebooks and experiments tell of worker processes: one copy of the weights, and the loss of one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import hybridlab as hl
from hybridlab import step_log
from hybridlab.bench.lost_worker import lose_worker
from hybridlab.bench.one_copy import BOUND, PARENT, TOGETHER, mapped_bytes, one_copy, private
from hybridlab.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers and smaps are Linux'")
WORKERS = {"prefill": {"threads": 1}, "decode": {"threads": 1}}
PAPER = {"name": "paper", "short_tokens": 256}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hl.Engine]:
    checkpoint = hl.make_checkpoint(
        tmp_path_factory.mktemp("workers") / "tiny", "tiny", layers=2, progress=False
    ).folder
    sizes: dict[str, Any] = {"kv_tokens": 2048, "token_budget": 1024}
    with hl.load(checkpoint, workers=WORKERS, precision="exact", prefix_cache=False, quiet=True, **sizes) as engine:
        yield engine


def requests() -> list[hl.Request]:
    users = [hl.Request(f"user {i}", tuple(range(i, i + 32)), 96) for i in range(2)]
    return [*users, hl.Request("long", tuple(i % 997 for i in range(1024)), 3, arrival_s=0.01)]


def test_a_lost_worker_is_told_and_no_token_is_lost(engine: hl.Engine) -> None:
    lost = lose_worker(engine, requests(), PAPER, after=2)
    (row,) = lost.summary.to_dict("records")
    assert (row["finished"], row["requests"], row["tokens_lost_or_twice"]) == (3, 3, 0)
    assert row["tokens_meanwhile"] > 0
    assert 0 < row["noticed_after_s"] < row["another_ready_after_s"]
    assert list(lost.requests["tokens"]) == [96, 96, 3] and all(lost.requests["equal"])
    steps: Any = lost.timeline[lost.timeline["row"] == "prefill"]
    assert list(steps["kind"]) == [step_log.LOST, step_log.PROMPT, step_log.KILLED]
    failed, again, killed = steps.to_dict("records")
    assert failed["start_s"] < killed["start_s"] < failed["end_s"] <= again["start_s"]


def test_who_is_not_there_cannot_be_killed(engine: hl.Engine) -> None:
    with pytest.raises(ConfigError, match="worker is 'main', expected one of this engine: prefill, decode"):
        lose_worker(engine, requests(), PAPER, worker="main")
    with pytest.raises(ConfigError, match="prefill was not killed"):
        lose_worker(engine, requests()[:2], PAPER)


def test_workers_have_one_copy_of_the_files(engine: hl.Engine) -> None:
    engine.serve(requests(), PAPER)
    table: Any = one_copy(engine)
    size_mb = engine.checkpoint.num_bytes / 1e6
    assert list(table.index) == ["prefill", "decode", PARENT, TOGETHER]
    assert (table["weights_private_mb"] == 0).all() and (table["other_private_mb"] > 0).all()
    assert (table["weights_mb"][["prefill", "decode"]] > 0.9 * size_mb).all()  # each of them sees all of it
    assert table.loc[TOGETHER, "weights_pss_mb"] == pytest.approx(table["weights_pss_mb"].iloc[:3].sum())
    assert 0.9 < table.loc[TOGETHER, "copies"] <= BOUND


def test_only_processes_are_looked_at(engine: hl.Engine) -> None:
    with hl.load(engine.checkpoint.folder, quiet=True) as alone, pytest.raises(ConfigError, match="worker processes"):
        one_copy(alone)
    with pytest.raises(ConfigError, match="/proc/0/smaps: cannot be read"):
        mapped_bytes(0)


def test_private_is_clean_and_dirty() -> None:
    assert private(Counter(Private_Clean=1, Private_Dirty=2, Rss=9)) == 3
