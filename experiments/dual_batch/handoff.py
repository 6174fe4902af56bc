"""What one hand-off from the GPU to the host and back costs, in several ways; nothing is computed in between.

`python experiments/dual_batch/handoff.py OUT [--layers 48] [--tokens 1,8]` on a machine with a GPU: a chain of layers,
each a small kernel, the hand-off, and a sum. Rows go to OUT/handoff.jsonl as they are made: microseconds a layer beyond
the same chain without hand-offs. Evidence for docs/decisions/0014.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import handoff_kernels
import numpy as np
import torch

import hybridlab as hl
from hybridlab.engine.stream_words import StreamWords
from hybridlab.kernels import native

HIDDEN, TOP_K = 2048, 8
WORD_BYTES = 64


class Chain:
    """Buffers and the two ends of every hand-off."""

    def __init__(self, layers: int, tokens: int) -> None:
        self.layers, self.tokens = layers, tokens
        self.x = torch.randn(tokens, HIDDEN, device="cuda")
        self.ids = torch.zeros(tokens, TOP_K, dtype=torch.int32, device="cuda")
        self.weights = torch.ones(tokens, TOP_K, device="cuda")
        self.out = torch.zeros_like(self.x)
        self.host_x, self.host_out = (torch.zeros(tokens, HIDDEN).pin_memory() for _ in range(2))
        self.host_ids = torch.zeros(tokens, TOP_K, dtype=torch.int32).pin_memory()
        self.host_weights = torch.zeros(tokens, TOP_K).pin_memory()
        self.staged = torch.zeros(tokens * (HIDDEN + 2 * TOP_K), dtype=torch.int32, device="cuda")
        self.host_staged = torch.zeros_like(self.staged, device="cpu").pin_memory()
        self.words = torch.zeros(2 * layers, WORD_BYTES // 4, dtype=torch.int32).pin_memory()
        self.stop = np.zeros(1, np.uint32)
        self.times = np.zeros((layers, 2))
        address = [self.host_x.data_ptr(), self.host_ids.data_ptr(), self.host_weights.data_ptr()]
        self.lane = native.HostLane(
            [
                (self.ready(i).data_ptr(), self.done(i).data_ptr(), None, *address, self.host_out.data_ptr(), tokens, 8)
                for i in range(layers)
            ]
        )

    def ready(self, layer: int) -> torch.Tensor:
        return self.words[2 * layer, :1]

    def done(self, layer: int) -> torch.Tensor:
        return self.words[2 * layer + 1, :1]

    def compute(self) -> None:
        self.x.mul_(0.999)

    def host(self) -> threading.Thread:
        thread = threading.Thread(target=lambda: self.lane.run(1, self.stop.ctypes.data, self.times.ctypes.data))
        thread.start()
        return thread


def by_kernels(chain: Chain) -> None:
    for layer in range(chain.layers):
        chain.compute()
        handoff_kernels.send(
            chain.x, chain.ids, chain.weights, chain.host_x, chain.host_ids, chain.host_weights, chain.ready(layer)
        )
        handoff_kernels.receive(chain.done(layer), chain.host_out, chain.out)
        chain.x.add_(chain.out)


def by_stream_words(chain: Chain) -> None:
    words = StreamWords()
    for layer in range(chain.layers):
        chain.compute()
        for host, there in ((chain.host_x, chain.x), (chain.host_ids, chain.ids), (chain.host_weights, chain.weights)):
            host.copy_(there, non_blocking=True)
        words.write(chain.ready(layer))
        words.wait(chain.done(layer))
        chain.out.copy_(chain.host_out, non_blocking=True)
        chain.x.add_(chain.out)


def by_words_and_one_copy(chain: Chain) -> None:
    """As the engine does: what goes down is one run of bytes."""
    words = StreamWords()
    for layer in range(chain.layers):
        chain.compute()
        pieces = (chain.x.view(torch.int32), chain.ids, chain.weights.view(torch.int32))
        torch.cat([piece.flatten() for piece in pieces], out=chain.staged)
        chain.host_staged.copy_(chain.staged, non_blocking=True)
        words.write(chain.ready(layer))
        words.wait(chain.done(layer))
        chain.out.copy_(chain.host_out, non_blocking=True)
        chain.x.add_(chain.out)


def by_kernels_and_words(chain: Chain) -> None:
    """Data by our kernels, which do not spin: the stream waits for the word."""
    words = StreamWords()
    for layer in range(chain.layers):
        chain.compute()
        handoff_kernels.send(
            chain.x, chain.ids, chain.weights, chain.host_x, chain.host_ids, chain.host_weights, chain.ready(layer)
        )
        words.wait(chain.done(layer))
        handoff_kernels.receive(chain.done(layer), chain.host_out, chain.out)
        chain.x.add_(chain.out)


def by_events(chain: Chain) -> None:
    """A Python thread waits for an event and enqueues the way back; the stream waits for that one's event."""
    stream, back = torch.cuda.current_stream(), torch.cuda.Stream()
    for _ in range(chain.layers):
        chain.compute()
        for host, there in ((chain.host_x, chain.x), (chain.host_ids, chain.ids), (chain.host_weights, chain.weights)):
            host.copy_(there, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
        arrived: list[torch.cuda.Event] = []

        def on_host(event: torch.cuda.Event = event, arrived: list[torch.cuda.Event] = arrived) -> None:
            event.synchronize()
            with torch.cuda.stream(back):
                chain.out.copy_(chain.host_out, non_blocking=True)
                arrived.append(torch.cuda.Event())
                arrived[0].record(back)

        POOL.submit(on_host).result()
        stream.wait_event(arrived[0])
        chain.x.add_(chain.out)


def nothing(chain: Chain) -> None:
    for _ in range(chain.layers):
        chain.compute()
        chain.x.add_(chain.out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--tokens", default="1,8")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for tokens in map(int, given.tokens.split(",")):
        base: dict[bool, float] = {}
        for name, enqueue, on_host in (
            ("no hand-off", nothing, False),
            ("events, a Python thread", by_events, False),
            ("stream words, copies", by_stream_words, True),
            ("stream words, one copy", by_words_and_one_copy, True),
            ("stream waits, kernels copy", by_kernels_and_words, True),
            ("kernels", by_kernels, True),
        ):
            for graph in (False, True):
                if graph and enqueue is by_events:
                    continue
                row = {"way": name, "graph": graph, "tokens": tokens, "layers": given.layers}
                try:
                    seconds = _time(Chain(given.layers, tokens), enqueue, graph, on_host)
                    base.setdefault(graph, seconds)
                    row["step_us"] = seconds * 1e6
                    row["us_a_layer"] = (seconds - base[graph]) / given.layers * 1e6
                except (RuntimeError, hl.HybridlabError) as error:
                    row["error"] = str(error).splitlines()[0]
                row["gpu"] = torch.cuda.get_device_name()
                with (given.out / "handoff.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def _time(chain: Chain, enqueue: Callable[[Chain], None], graph: bool, on_host: bool) -> float:
    """Median seconds of a whole chain."""
    stream = torch.cuda.Stream()
    captured = torch.cuda.CUDAGraph()

    def launch() -> None:
        if graph:
            captured.replay()
        else:
            enqueue(chain)

    def once(run: Callable[[], None]) -> float:
        chain.words.zero_()
        thread = chain.host() if on_host else None
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        try:
            run()
            stream.synchronize()
        finally:
            if thread is not None:
                if any(chain.words[::2, 0] == 0):
                    chain.stop[0] = 1
                thread.join()
        return time.perf_counter() - start_s

    with torch.cuda.stream(stream):
        once(lambda: enqueue(chain))
        if graph:
            with torch.cuda.graph(captured, stream=stream):
                enqueue(chain)
        return statistics.median([once(launch) for _ in range(30)][5:])


if __name__ == "__main__":
    from concurrent.futures import ThreadPoolExecutor

    POOL = ThreadPoolExecutor(1)
    main()
