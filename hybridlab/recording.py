"""`hl.record_routing`: run prompts and keep which experts every token chose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybridlab.batch import Entry
from hybridlab.errors import HybridlabError, RequestError
from hybridlab.request import Request, RequestRecord, Status
from hybridlab.routing import RoutingStats
from hybridlab.session import Engine, Prompt


def record_routing(
    engine: Engine, prompts: Sequence[Prompt], max_tokens: int = 1, *, progress: bool = True
) -> RoutingStats:
    """Serve `prompts` (texts or token ids) for up to `max_tokens` tokens each; sequence i of the result is prompt i.

    A sequence covers the prompt and all drawn tokens but the last, which no layer saw. Raises `RequestError` for a
    prompt that cannot be served, before anything runs, and `HybridlabError` if a step fails.
    """
    from tqdm.auto import tqdm

    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):
        raise RequestError(f"prompts is {prompts!r:.60}, expected a list with at least one prompt")
    requests = [Request(f"prompt{i:05d}", engine.token_ids(p), max_tokens) for i, p in enumerate(prompts)]
    for request in requests:
        engine.require_servable(request)
    recorder = _Recorder(engine.spec.moe_layers)
    with tqdm(total=len(requests), unit="prompt", disable=not progress) as bar:

        def on_event(record: RequestRecord, _: int) -> None:
            bar.update(int(record.is_final))

        served = engine.serve(requests, on_route=recorder, on_event=on_event)
    for record in served.records:
        if record.status is not Status.FINISHED:
            raise HybridlabError(f"prompt {int(record.request.id[6:])}: {record.status}: {record.error}")
    chosen = [recorder.tokens(r.request.id, len(r.prompt) + len(r.output) - 1) for r in served.records]
    source = f"recorded: {engine.checkpoint.folder.name}, {len(requests)} prompts"
    return RoutingStats.of_tokens(chosen, engine.spec.moe_layers, engine.spec.num_experts, source)


class _Recorder:
    """Keeps the router's choices by request, layer and position; a token that is computed again is kept once."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._rows: dict[str, dict[tuple[int, int], np.ndarray]] = {}

    def __call__(self, layer: int, entries: Sequence[Entry], expert_ids: np.ndarray) -> None:
        first = 0
        for entry in entries:
            last = first + len(entry.token_ids)
            self._rows.setdefault(entry.id, {})[layer, entry.start] = expert_ids[first:last].astype(np.int16)
            first = last

    def tokens(self, request_id: str, num_tokens: int) -> np.ndarray:
        """int16 [T, L, K] of a request."""
        rows = self._rows[request_id]
        top_k = next(iter(rows.values())).shape[1]
        result = np.empty((num_tokens, len(self._layers), top_k), np.int16)
        for (layer, start), ids in rows.items():
            result[start : start + len(ids), self._layers.index(layer)] = ids
        return result
