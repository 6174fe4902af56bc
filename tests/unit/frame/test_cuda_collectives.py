"""What ranks on GPUs send each other: what NCCL brings, or sockets by way of the host, is what gloo brings to CPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event as Flag
from time import monotonic, sleep

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from hybridlab.engine.collectives import GlooPeers, Peers, Traffic
from hybridlab.engine.cuda_collectives import NcclGroup, NcclPeers, StagedPeers, Watch, make_peers, rank_device
from hybridlab.engine.ep_exchange import Wire, make_exchanges
from hybridlab.errors import WorkerLost
from hybridlab.model.base import Routed
from hybridlab.plans import EXCHANGES

GPUS = torch.cuda.device_count()
ONE_GPU = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="torch finds no CUDA device")]
TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"torch finds {GPUS} CUDA devices, NCCL needs one for each rank"),
]
SIZES, HIDDEN, EXPERTS, TOP_K = (7, 0), 64, 5, 2
OWNER = torch.tensor([0, 0, 1, 1, 1])
Made = tuple[Peers, str]


def on_ranks(make: Callable[[int, HashStore], Made], work: Callable[[Peers, str], object]) -> list:
    """What `work` returns on two ranks, threads of this process that `make` their ends and devices."""
    store = HashStore()

    def run(rank: int):
        peers, device = make(rank, store)
        found = work(peers, device)
        if isinstance(peers, NcclPeers):
            torch.cuda.synchronize()
            peers.group.close()
        return found

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def gloo(rank: int, store: HashStore) -> Made:
    return GlooPeers("test", store, rank, 2, timeout_s=60), "cpu"


def staged(rank: int, store: HashStore) -> Made:
    return StagedPeers(gloo(rank, store)[0]), "cpu"


def staged_on_gpu(rank: int, store: HashStore) -> Made:
    return StagedPeers(gloo(rank, store)[0]), "cuda:0"


def nccl(rank: int, store: HashStore) -> Made:
    torch.cuda.set_device(rank)
    return NcclPeers(NcclGroup(store, rank, 2, timeout_s=60)), f"cuda:{rank}"


WAYS = [
    staged,
    pytest.param(staged_on_gpu, marks=ONE_GPU),
    pytest.param(nccl, marks=TWO_GPUS),
]


def through(name: str) -> Callable[[Peers, str], tuple[torch.Tensor, Traffic]]:
    """A layer's exchange, of whose tokens the second rank has none. Expert e multiplies by e + 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SIZES), HIDDEN, generator=generator)
    ids = torch.rand(sum(SIZES), EXPERTS, generator=generator).topk(TOP_K).indices.int()
    weights = torch.rand(sum(SIZES), TOP_K, generator=generator)

    def work(peers: Peers, device: str) -> tuple[torch.Tensor, Traffic]:
        rows, owner = slice(sum(SIZES[: peers.rank]), sum(SIZES[: peers.rank + 1])), OWNER.to(device)
        exchange = make_exchanges(peers, Wire(), {0: owner})[name]
        gathered = exchange.gather(x[rows].to(device), SIZES)
        seen = slice(None) if name == "small_ep" else rows
        own = Routed(gathered, ids[seen].to(device), weights[seen].to(device))
        moved, trip = exchange.dispatch(0, own, SIZES)
        mine = (moved.expert_ids >= 0) & (owner[moved.expert_ids.long().clamp(min=0)] == peers.rank)
        factors = (torch.where(mine, moved.expert_ids + 1, 0) * moved.weights).sum(1, keepdim=True)
        return exchange.reduce(moved.x_TH * factors, trip).cpu(), peers.traffic

    return work


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EXCHANGES)
def test_exchanges_bring_what_gloo_brings(name, way):
    expected = on_ranks(gloo, through(name))
    for (a, sent), (b, wanted) in zip(on_ranks(way, through(name)), expected, strict=True):
        torch.testing.assert_close(a, b)
        assert sent == wanted
    assert expected[0][0].abs().sum() > 0 and expected[1][0].shape == (0, HIDDEN)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_any_type_arrive_and_what_a_rank_keeps_is_the_same_tensor(way):
    def work(peers: Peers, device: str) -> None:
        for dtype in (torch.int64, torch.int32, torch.bfloat16):
            sends = [torch.full((2 + peer, 3), 10 * peers.rank + peer, dtype=dtype, device=device) for peer in range(2)]
            got = peers.exchange(sends, [2 + peers.rank] * 2)
            assert got[peers.rank] is sends[peers.rank]
            for peer, rows in enumerate(got):
                assert rows.dtype is dtype and rows.device == sends[0].device
                assert rows.tolist() == [[10 * peer + peers.rank] * 3] * (2 + peers.rank)
        # One tensor for all comes down once, and nothing is no exchange that anybody waits for.
        x = torch.arange(4.0, device=device) + peers.rank
        assert torch.cat(peers.exchange([x, x], [4, 4])).tolist() == [0, 1, 2, 3, 1, 2, 3, 4]
        assert [len(part) for part in peers.exchange([x[:0], x[:0]], [0, 0])] == [0, 0]

    on_ranks(way, work)


@dataclass
class Done:
    """As a CUDA event."""

    done: bool = False

    def query(self) -> bool:
        return self.done


def wait_for(flag: Flag) -> None:
    assert flag.wait(30), "waited in vain"


def test_a_rank_that_does_not_answer_is_named_and_what_waits_for_it_is_ended():
    store, ended = HashStore(), [Flag(), Flag()]
    watches = [Watch(store, rank, 3, 0.2, ended[rank].set) for rank in range(2)]  # the third one hangs
    for watch in watches:
        watch.add(Done(done=True))
        watch.add(Done())
        watch.check()
    for flag in ended:
        wait_for(flag)
    for rank, watch in enumerate(watches):
        with pytest.raises(WorkerLost, match=f"rank 2 did not answer rank {rank} within 0.2 s"):
            watch.check()
        watch.close()


def test_ranks_that_wait_for_each_other_crosswise_say_so():
    store, ended = HashStore(), [Flag(), Flag()]
    watches = [Watch(store, rank, 2, 0.2, ended[rank].set) for rank in range(2)]
    for watch in watches:
        watch.add(Done())
    for watch, flag in zip(watches, ended, strict=True):
        wait_for(flag)
        with pytest.raises(WorkerLost, match=r"ranks did not answer each other within 0\.2 s"):
            watch.check()
        watch.close()


def test_each_exchange_has_its_own_time():
    """Many that wait behind a first one are not late when it is."""
    ended, events = Flag(), [Done() for _ in range(4)]
    watch = Watch(HashStore(), 0, 2, 2.0, ended.set)
    for event in events:
        watch.add(event)
    for event in events:
        sleep(0.7)
        event.done = True
    until_s = monotonic() + 30
    while watch._pending:
        assert monotonic() < until_s
        sleep(0.01)
    assert not ended.is_set()
    watch.check()
    watch.close()


@pytest.mark.parametrize(
    ("gpus", "ranks", "expected"),
    [
        (0, 2, [("cpu", False)] * 2),
        (1, 2, [("cuda:0", False)] * 2),
        (2, 2, [("cuda:0", True), ("cuda:1", True)]),
        (2, 3, [("cuda:0", False), ("cuda:1", False), ("cuda:0", False)]),
    ],
)
def test_ranks_share_out_the_gpus_of_their_host(monkeypatch, gpus, ranks, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    store = HashStore()
    with ThreadPoolExecutor(ranks) as pool:
        assert list(pool.map(lambda rank: rank_device(store, rank, ranks), range(ranks))) == expected
    assert sorted(chosen) == sorted(int(where[-1]) for where, _ in expected if where != "cpu")


def test_each_name_is_a_group_of_its_own():
    store = HashStore()

    def make(rank: int):
        how = {"device": torch.device("cpu"), "alone": False, "timeout_s": 60.0, "interface": "lo"}
        return make_peers(("a", "b"), store, rank, 2, **how)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(make, range(2)))
    for name in ("a", "b"):
        ends = [groups[name] for groups, _ in made]
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(lambda peers: peers.exchange([torch.ones(1)] * 2, [1, 1]), ends))
        assert [len(each) for each in got] == [2, 2]
    for groups, check in made:
        check()
        assert groups["a"].traffic == groups["b"].traffic == Traffic(4, 4)
