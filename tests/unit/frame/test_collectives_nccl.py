"""The same exchanges between two GPUs: what NCCL brings is what gloo brings."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ranks_in_threads import on_ranks
from torch._C._distributed_c10d import HashStore

from hybridlab.engine.collectives import NcclPeers, Peers
from hybridlab.engine.ep_exchange import Wire, make_exchanges
from hybridlab.model.base import Routed
from hybridlab.plans import EXCHANGES

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"torch finds {GPUS} CUDA devices, NCCL needs one for each rank"),
]
SIZES, HIDDEN, EXPERTS, TOP_K = (7, 0), 64, 5, 2
OWNER = torch.tensor([0, 0, 1, 1, 1])


def routed() -> Routed:
    """All tokens, of whom the second rank has none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SIZES), HIDDEN, generator=generator)
    ids = torch.rand(sum(SIZES), EXPERTS, generator=generator).topk(TOP_K).indices.int()
    return Routed(x, ids, torch.rand(sum(SIZES), TOP_K, generator=generator))


def through(name: str, peers: Peers, device: str) -> torch.Tensor:
    whole, rows = routed(), slice(sum(SIZES[: peers.rank]), sum(SIZES[: peers.rank + 1]))
    exchange = make_exchanges(peers, Wire(), {0: OWNER})[name]
    x = exchange.gather(whole.x_TH[rows].to(device), SIZES)
    seen = slice(None) if len(x) == sum(SIZES) and name == "small_ep" else rows
    own = Routed(x, whole.expert_ids[seen].to(device), whole.weights[seen].to(device))
    moved, trip = exchange.dispatch(0, own, SIZES)
    mine = (moved.expert_ids >= 0) & (OWNER.to(device)[moved.expert_ids.long().clamp(min=0)] == peers.rank)
    # Expert e multiplies by e + 1.
    factors = (torch.where(mine, moved.expert_ids + 1, 0) * moved.weights).sum(1, keepdim=True)
    return exchange.reduce(moved.x_TH * factors, trip).cpu()


@pytest.mark.parametrize("name", EXCHANGES)
def test_nccl_brings_what_gloo_brings(name):
    store = HashStore()

    def on_gpu(rank: int):
        torch.cuda.set_device(rank)
        peers = NcclPeers("test", store, rank, 2, timeout_s=60)
        found = through(name, peers, f"cuda:{rank}")
        torch.cuda.synchronize(rank)
        return found, peers.traffic

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(on_gpu, range(2)))
    expected = on_ranks(2, lambda peers: (through(name, peers, "cpu"), peers.traffic))
    for (a, sent), (b, wanted) in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert sent == wanted
    assert got[0][0].abs().sum() > 0 and got[1][0].shape == (0, HIDDEN)
