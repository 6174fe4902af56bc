"""What ranks on GPUs send each other: through NCCL where each has a GPU of its own, else by way of the host."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from hybridlab.engine.collectives import BLAME_S, LOOPBACK, GlooPeers, Peers, Traffic
from hybridlab.errors import WorkerLost


class Event(Protocol):
    """As `torch.cuda.Event`."""

    def query(self) -> bool: ...


class Watch:
    """Whether exchanges that a device waits for end: one that does not, within `timeout_s` of the one before it, is
    given up by `abort`, from a thread of this. `check` raises from then on.

    Ranks that give up say so in `store`; one that does not is the one to blame. `device` is the events' CUDA device.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout_s: float,
        abort: Callable[[], None],
        device: int | None = None,
    ) -> None:
        self._store, self._rank, self._size, self._timeout_s = store, rank, size, timeout_s
        self._abort, self._device = abort, device
        self._lost: str | None = None
        self._pending: deque[tuple[Event, float]] = deque()
        self._work, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="hybridlab-nccl-watch", daemon=True)
        self._thread.start()

    def add(self, done: Event) -> None:
        """What was enqueued last; `done` says when it has ended."""
        self._pending.append((done, monotonic()))
        self._work.set()

    def check(self) -> None:
        """Raises `WorkerLost` naming a rank that did not answer: what was received since then is nothing."""
        if self._lost is not None:
            raise WorkerLost(self._lost)

    def close(self) -> None:
        """Idempotent."""
        self._closed.set()
        self._work.set()
        self._thread.join()

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # or this thread would take memory of the first one
        since_s = monotonic()  # when the exchange before was done
        while not self._closed.is_set():
            if not self._pending:
                self._work.wait()
                self._work.clear()
                since_s = monotonic()
                continue
            done, enqueued_s = self._pending[0]
            try:
                is_done = done.query()
            except RuntimeError:  # of the device, which the step meets itself
                return
            if is_done:
                self._pending.popleft()
                since_s = monotonic()
            elif monotonic() - max(since_s, enqueued_s) > self._timeout_s:
                self._lost = self._whom()
                self._abort()  # what the device waits for ends now
                return
            else:
                self._closed.wait(min(0.2, self._timeout_s / 10))

    def _whom(self) -> str:
        self._store.set(f"waits/{self._rank}", "")
        self._closed.wait(BLAME_S)
        silent = [peer for peer in range(self._size) if not self._store.check([f"waits/{peer}"])]
        who = f"rank {silent[0]} did not answer rank {self._rank}" if silent else "ranks did not answer each other"
        return f"{who} within {self._timeout_s:g} s"


class NcclGroup:
    """One communicator for all that a rank exchanges: what is enqueued first is sent first, from whatever stream.

    So ranks that enqueue in the same order cannot wait for each other crosswise, as they could with two. The host does
    not wait: see `Watch` for what does not end. NCCL's own sockets are on `interface`. All ranks make their groups at
    the same time, on the current CUDA device; raises `WorkerLost` if they do not find each other.
    """

    def __init__(
        self, store: Store, rank: int, size: int, *, timeout_s: float = 300.0, interface: str = LOOPBACK
    ) -> None:
        self.rank, self.size = rank, size
        store = PrefixStore("nccl", store)
        os.putenv("NCCL_SOCKET_IFNAME", f"={interface}")  # NCCL knows no other way to be told
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=2 * timeout_s + 60)  # torch's own watch ends the process: ours is first
        try:
            self._group: Any = dist.ProcessGroupNCCL(PrefixStore("group", store), rank, size, options)
            # NCCL connects in the first exchange, which is not to be in a step.
            one, all_of = torch.zeros(size, device="cuda"), [1] * size
            self._group.alltoall_base(torch.empty_like(one), one, all_of, all_of, dist.AllToAllOptions()).wait()
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise WorkerLost(f"rank {rank} of {size} did not find the others: {error}") from None
        self._watch = Watch(store, rank, size, timeout_s, self._group.abort, torch.cuda.current_device())
        self.check = self._watch.check

    def all_to_all(self, out: torch.Tensor, given: torch.Tensor, out_rows: list[int], in_rows: list[int]) -> None:
        """Enqueue an exchange: `in_rows` of `given` to each rank, `out_rows` of `out` from each."""
        self.check()
        try:
            work = self._group.alltoall_base(out, given, out_rows, in_rows, dist.AllToAllOptions())
        except RuntimeError:
            self.check()  # it was given up meanwhile
            raise
        work.wait()  # the current stream does, not this thread
        done = torch.cuda.Event()
        done.record()
        self._watch.add(done)

    def close(self) -> None:
        """End the communicator, whether peers answer or not; once."""
        self._watch.close()
        self._group.abort()


class NcclPeers:
    """On CUDA tensors: what is received is there for the current stream, and the host does not wait for it."""

    def __init__(self, group: NcclGroup) -> None:
        self.rank, self.size, self.traffic = group.rank, group.size, Traffic()
        self.group = group

    def exchange(self, sends: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        own, tail = sends[self.rank], sends[self.rank].shape[1:]
        out_rows = [0 if peer == self.rank else size for peer, size in enumerate(sizes)]
        others = [sent for peer, sent in enumerate(sends) if peer != self.rank]
        in_rows = [0 if peer == self.rank else len(sent) for peer, sent in enumerate(sends)]
        given = others[0].contiguous() if len(others) == 1 else torch.cat(others or [own[:0]])
        buffer = own.new_empty(sum(out_rows), *tail)
        if given.numel() or buffer.numel():  # who has nothing for anybody and gets nothing is not missed
            self.group.all_to_all(buffer, given, out_rows, in_rows)
        self.traffic.sent_bytes += given.nbytes
        self.traffic.received_bytes += buffer.nbytes
        received = list(buffer.split(out_rows))
        received[self.rank] = own
        return received


class StagedPeers:
    """On CUDA tensors, over `inner` in pinned memory of the host: for ranks that share a GPU, which NCCL does not take.

    The host waits for the device at each exchange.
    """

    def __init__(self, inner: Peers) -> None:
        self.rank, self.size, self.traffic = inner.rank, inner.size, inner.traffic
        self._inner = inner

    def exchange(self, sends: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        own = sends[self.rank]
        staged: dict[int, torch.Tensor] = {}  # what goes to several ranks comes down once
        for peer, sent in enumerate(sends):
            if peer != self.rank and id(sent) not in staged:
                room = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=sent.is_cuda)
                staged[id(sent)] = room.copy_(sent, non_blocking=True)
        if own.is_cuda:
            torch.cuda.current_stream(own.device).synchronize()
        down = [own[:0].cpu() if peer == self.rank else staged[id(sent)] for peer, sent in enumerate(sends)]
        received = self._inner.exchange(down, sizes)
        up = [part.to(own.device, non_blocking=True) for part in received]
        up[self.rank] = own
        return up


def rank_device(store: Store, rank: int, size: int) -> tuple[str, bool]:
    """The torch device of a rank, from now on the current one of this thread, and whether each of all ranks has a GPU
    alone. It is one of the GPUs of its host; "cpu" where there are none.

    All ranks ask at the same time: they tell each other, in `store`, where they are.
    """
    store = PrefixStore("gpus", store)
    host, count = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), torch.cuda.device_count()
    store.set(str(rank), f"{host} {count}")
    told = [store.get(str(peer)).decode().split() for peer in range(size)]
    hosts = [where for where, _ in told]
    if not count:
        return "cpu", False
    index = hosts[:rank].count(host) % count
    torch.cuda.set_device(index)  # Triton's kernels and NCCL run on the current one
    return f"cuda:{index}", all(hosts.count(where) <= int(gpus) for where, gpus in told)


def make_peers(
    names: Sequence[str],
    store: Store,
    rank: int,
    size: int,
    *,
    device: torch.device,
    alone: bool,
    timeout_s: float,
    interface: str,
) -> tuple[Mapping[str, Peers], Callable[[], None]]:
    """For each name the end of a group of its own, for tensors on `device`, and what raises `WorkerLost` after a step
    that did not get what it waited for. `alone`: each rank has a GPU of its own."""
    how: dict[str, Any] = {"timeout_s": timeout_s, "interface": interface}
    if device.type == "cuda" and alone:
        group = NcclGroup(store, rank, size, **how)
        return {name: NcclPeers(group) for name in names}, group.check
    peers: dict[str, Peers] = {name: GlooPeers(name, store, rank, size, **how) for name in names}
    if device.type == "cuda":
        peers = {name: StagedPeers(each) for name, each in peers.items()}
    return peers, lambda: None
