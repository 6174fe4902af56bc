"""What ranks send each other: rows of tensors from every rank to every rank, counted, on torch.distributed.

Process groups are made directly rather than as torch's global one, so that several live side by side: one per thread
that communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from hybridlab.errors import WorkerLost

LOOPBACK = "lo"
MEET_S = 60.0
"""At least so long ranks wait for each other to start."""
BLAME_S = 1.0
"""How long a rank waits for a peer that broke off to say which other rank it has lost."""


@dataclass
class Traffic:
    """Bytes of tensors that one rank has handed to other ranks, and got of them."""

    sent_bytes: int = 0
    received_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent_bytes + other.sent_bytes, self.received_bytes + other.received_bytes)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent_bytes - other.sent_bytes, self.received_bytes - other.received_bytes)


class Peers(Protocol):
    """One rank's end of a group of `size` ranks. `traffic` counts what crosses it, not what a rank keeps."""

    rank: int
    size: int
    traffic: Traffic

    def exchange(self, sends: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Give `sends[p]`, [rows, ...], to each rank p; returns what each gave, of `sizes[p]` rows, by rank.

        All of one call have the same type and the same shape beside their rows; rows may be none. Every rank of the
        group makes the same calls in the same order. What a rank gives itself is passed through. Raises `WorkerLost`
        naming a rank that is gone, or that did not answer in time.
        """
        ...


class GlooPeers:
    """On CPU tensors, over sockets of `interface`; each wait lasts at most `timeout_s`.

    Groups of the same ranks and `store` differ by `name`. A rank that loses a peer leaves a note of it in the store, so
    that those who see *it* end name the one that was first.
    """

    def __init__(
        self, name: str, store: Store, rank: int, size: int, *, timeout_s: float = 300.0, interface: str = LOOPBACK
    ) -> None:
        self.rank, self.size, self.traffic = rank, size, Traffic()
        self._store, self._timeout_s = store, timeout_s
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(interface=interface)]
        options._timeout = timedelta(seconds=max(timeout_s, MEET_S))
        try:
            self._group = gloo(PrefixStore(name, store), rank, size, options)
        except RuntimeError as error:
            raise WorkerLost(f"rank {rank} of {size} did not find the others: {error}") from None

    def exchange(self, sends: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        received = list(sends)
        works, kept = [], []  # a tensor lives until it has been sent
        for peer in range(self.size):
            if peer == self.rank:
                continue
            given = sends[peer].contiguous()
            buffer = torch.empty(sizes[peer], *given.shape[1:], dtype=given.dtype, pin_memory=given.is_pinned())
            received[peer] = buffer
            kept.append(given)
            for call, tensor in ((self._group.recv, buffer), (self._group.send, given)):
                if tensor.numel():
                    works.append((peer, self._start(peer, call, tensor)))
            self.traffic.sent_bytes += given.nbytes
            self.traffic.received_bytes += buffer.nbytes
        start_s = monotonic()
        for peer, work in works:
            try:
                work.wait(timedelta(seconds=self._timeout_s))
            except RuntimeError as error:
                raise self._lost(peer, str(error), monotonic() - start_s) from None
        return received

    def _start(self, peer: int, call, tensor: torch.Tensor) -> dist.Work:
        try:
            return call([tensor], peer, 0)
        except RuntimeError as error:
            raise self._lost(peer, str(error), 0.0) from None

    def _lost(self, peer: int, why: str, waited_s: float) -> WorkerLost:
        if waited_s >= self._timeout_s:
            text = f"rank {peer} did not answer rank {self.rank} within {self._timeout_s:g} s"
        else:
            until_s = monotonic() + BLAME_S
            while not self._store.check([f"lost/{peer}"]) and monotonic() < until_s:
                sleep(0.01)
            if self._store.check([f"lost/{peer}"]):
                text = self._store.get(f"lost/{peer}").decode()
            else:
                text = f"rank {peer} is gone: {why.splitlines()[0]:.200}"
        self._store.set(f"lost/{self.rank}", text)
        return WorkerLost(text)
