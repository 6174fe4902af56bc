"""`hl.Engine`: a loaded model that generates, scores and serves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hybridlab.admission import Limits, why_refused
from hybridlab.batch import Entry, OnRoute
from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.memory import Peak
from hybridlab.engine.options import is_count
from hybridlab.engine.ranks import Ranks
from hybridlab.engine.runtime import Runtime
from hybridlab.engine.worker_process import WorkerProcess
from hybridlab.engine.workers import Workers
from hybridlab.errors import ConfigError, HybridlabError, RequestError
from hybridlab.kv_blocks import BlockPool
from hybridlab.lowering import Planner
from hybridlab.plans import StepPlan
from hybridlab.prefix_cache import NoPrefixes, PrefixCache, Prefixes
from hybridlab.request import Request, RequestRecord, Sampling, Status
from hybridlab.request_queue import RequestQueue
from hybridlab.serving import Served, serve, steps
from hybridlab.strategies.registry import label, resolve
from hybridlab.text import Text

Prompt = str | Sequence[int]
LoneRuntime = Runtime | WorkerProcess | Ranks
AnyRuntime = LoneRuntime | Workers


class Engine:
    """A model that generates (`generate`, `stream`), scores (`logits`) and serves request lists (`serve`).

    One run at a time: a second call while one is in progress, an open `stream` included, is refused with an
    error rather than left to hang. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: AnyRuntime,
        planner: Planner,
        precision: str,
        threads: int,
        token_budget: int,
        prefixes: Callable[[BlockPool], Prefixes] = PrefixCache,
    ) -> None:
        self.checkpoint, self.spec = checkpoint, checkpoint.spec
        self.precision, self.threads, self.token_budget = precision, threads, token_budget
        self.memory = runtime.memory
        self._runtime: AnyRuntime | None = runtime
        self.planner = planner
        self._prefixes = prefixes
        self._text = Text(checkpoint.folder)
        self._turn = threading.Lock()
        self._queue: RequestQueue | None = None

    def serve(
        self,
        requests: Sequence[Request],
        scheduler: Any = "fcfs",
        *,
        token_budget: int | None = None,
        keep_span_steps: int = 64,
        on_event: Callable[[RequestRecord, int], None] | None = None,
        on_route: OnRoute | None = None,
    ) -> Served:
        """Serve `requests` at their arrival times under `scheduler`; one bad request never stops the others.

        `token_budget` lowers the engine's own. `on_event(record, token)` is called for every drawn token. `on_route`
        sees, or replaces, what every router chose (`RoutingStats.replay`); each token is computed then, for
        nothing is taken from the prefix cache.
        """
        scheduler = resolve("scheduler", scheduler)
        if not isinstance(requests, Sequence) or not all(isinstance(request, Request) for request in requests):
            raise RequestError(f"requests is {requests!r:.60}, expected a list of hl.Request")
        if not isinstance(keep_span_steps, int) or keep_span_steps < 0:
            raise ConfigError(f"keep_span_steps is {keep_span_steps!r}, expected an int >= 0")
        prefixes = self._prefixes if on_route is None else lambda pool: NoPrefixes()
        with self._run(requests, token_budget, prefixes) as (runtime, queue):
            return serve(
                runtime.backend(on_route),
                queue,
                scheduler,
                self.planner,
                keep_span_steps=keep_span_steps,
                on_event=on_event,
            )

    def cancel(self, request_id: str) -> bool:
        """End a request of the run in progress, from any thread; False if it is unknown or has ended."""
        queue, runtime = self._queue, self._runtime
        found = queue is not None and queue.cancel(request_id)
        if found and runtime is not None:
            runtime.wake()
        return found

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> list[int] | str:
        """Up to `max_tokens` new tokens: text for a text prompt, else token ids, ending with an eos token if drawn."""
        sampling = Sampling(temperature, top_p, seed)
        tokens = list(self._token_stream(prompt, max_tokens, sampling, stop_token_ids))
        return self._text.decode(self._without_stop(tokens, stop_token_ids)) if isinstance(prompt, str) else tokens

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> Iterator[int | str]:
        """Like `generate`, token by token (pieces of text for a text prompt). Closing the iterator cancels."""
        tokens = self._token_stream(prompt, max_tokens, Sampling(temperature, top_p, seed), stop_token_ids)
        if not isinstance(prompt, str):
            return tokens
        stops = {*self.spec.eos_token_ids, *stop_token_ids}
        return self._text.pieces(token for token in tokens if token not in stops)

    def logits(self, prompt: Prompt) -> np.ndarray:
        """Logits after every token of the prompt, float32 [T, V]."""
        ids = self.token_ids(prompt)
        request = Request("logits", ids, max_tokens=1)
        with self._run((request,), None) as (runtime, _):
            pool = self._pool(runtime)
            table: list[int] = []
            pool.grow(table, len(ids))
            rows = []
            for start in range(0, len(ids), self.token_budget):
                chunk = ids[start : start + self.token_budget]
                step = StepPlan("prefill", {"logits": len(chunk)})
                program = self.planner.program(self.planner.shape("main", step))
                entry = Entry("logits", chunk, start, tuple(table), Sampling(), wants_token=True)
                rows.append(runtime.logits(program, entry).numpy())
            return np.concatenate(rows)

    @property
    def runtime(self) -> AnyRuntime:
        """What computes, for benchmarks and tests; raises `HybridlabError` once closed."""
        if self._runtime is None:
            raise HybridlabError(f"the engine of {self.checkpoint.folder} is closed")
        return self._runtime

    @property
    def lone_runtime(self) -> LoneRuntime:
        """The same, to be stepped by hand; raises `HybridlabError` if there are workers for prompts and for decodes."""
        runtime = self.runtime
        if isinstance(runtime, Workers):
            raise HybridlabError("an engine with workers for prompts and for decodes has no single one to step by hand")
        return runtime

    def close(self) -> None:
        """End the worker and free the KV cache; idempotent."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            runtime.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        s, hardware = self.spec, self.planner.hardware
        origin = f"calibrated {hardware.calibrated}" if hardware.calibrated else "not calibrated, the paper's"
        thresholds = "" if hardware.device == "cpu" else f", thresholds={origin}"
        count = len(self.planner.rank_sets[0])
        ranks = "" if count == 1 else f" on each of {count} ranks"
        split = f", workers {', '.join(self._runtime.pids)}" if isinstance(self._runtime, Workers) else ""
        return (
            f"Engine({self.checkpoint.folder.name}: {s.family}, {s.num_layers} layers, {s.num_experts} experts top-"
            f"{s.top_k}, {s.weight_dtype} weights, precision={self.precision}, threads={self.threads}{ranks}{split}"
            f"{thresholds})"
        )

    def _repr_html_(self) -> str:
        placement, overlap = label(self.planner.placement), label(self.planner.overlap)
        peak = "" if (found := self.peak()) is None else f"<br>{found}"
        return f"<b>{self!r}</b><br>placement {placement}, overlap {overlap}{self.memory._repr_html_()}{peak}"

    def peak(self) -> Peak | None:
        """The most that has been taken of the GPU so far, to be held against `memory.gpu`; None without a GPU, once
        closed, and with several ranks or workers."""
        runtime = self._runtime
        return runtime.peak() if isinstance(runtime, Runtime | WorkerProcess) else None

    def _token_stream(
        self, prompt: Prompt, max_tokens: int, sampling: Sampling, stop_token_ids: Sequence[int]
    ) -> Iterator[int]:
        request = Request("generate", self.token_ids(prompt), max_tokens, 0.0, sampling, stop_token_ids)  # type: ignore[arg-type]
        self.require_servable(request)
        return self._drawn(request)

    def _drawn(self, request: Request) -> Iterator[int]:
        with self._run((request,), None) as (runtime, queue):
            for _, events in steps(runtime.backend(), queue, resolve("scheduler", "fcfs"), self.planner):
                for _, token in events:
                    yield token
            record = queue.records[request.id]
            if record.status is Status.FAILED:
                raise HybridlabError(f"generation failed: {record.error}")

    @contextmanager
    def _run(
        self,
        requests: Sequence[Request],
        token_budget: int | None,
        prefixes: Callable[[BlockPool], Prefixes] | None = None,
    ) -> Iterator[tuple[AnyRuntime, RequestQueue]]:
        runtime = self.runtime
        if token_budget is not None and not is_count(token_budget):
            raise ConfigError(f"token_budget is {token_budget!r}, expected an int >= 1")
        budget = min(self.token_budget, token_budget or self.token_budget)
        # Not blocking: the holder may be a half-read stream of this very thread.
        if not self._turn.acquire(blocking=False):
            raise HybridlabError("the engine is busy with another run; finish it, or close() the open stream")
        try:
            if isinstance(runtime, Workers):  # each with a cache of its own, in which prefixes are not looked for
                self._queue = RequestQueue(requests, runtime.pools(), self.spec, budget, replays=1)
            else:
                pool = self._pool(runtime)
                known = (prefixes or self._prefixes)(pool)
                how = {"replays": int(isinstance(runtime, Ranks)), "rank_sets": self.planner.rank_sets}
                self._queue = RequestQueue(requests, pool, self.spec, budget, known, **how)
            yield runtime, self._queue
        finally:
            self._queue = None
            self._turn.release()

    def _pool(self, runtime: AnyRuntime) -> BlockPool:
        return BlockPool(runtime.num_kv_blocks, runtime.kv_block_tokens)

    def require_servable(self, request: Request) -> None:
        """Raise `RequestError` if `request` can never be served here, naming the value that is off."""
        limits = Limits(self.memory.kv_tokens, self.spec.max_positions, self.spec.vocab)
        if reason := why_refused(request, limits):
            raise RequestError(reason)

    def token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a text, by the checkpoint's tokenizer, or of a sequence; raises `RequestError` for bad ones."""
        ids = self._text.encode(prompt) if isinstance(prompt, str) else prompt
        self.require_servable(Request("prompt", ids, 1))  # type: ignore[arg-type]
        return tuple(int(token) for token in ids)

    def _without_stop(self, tokens: list[int], stop_token_ids: Sequence[int]) -> list[int]:
        stops = {*self.spec.eos_token_ids, *stop_token_ids}
        return tokens[:-1] if tokens and tokens[-1] in stops else tokens
