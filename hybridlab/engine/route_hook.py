"""The parent's side of a routing hook that a worker process asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridlab.batch import Entry, OnRoute
from hybridlab.engine.channel import Kind
from hybridlab.engine.executor import check_chosen
from hybridlab.engine.step_messages import unpack_choice


class RouteHook:
    """Answers a child's routers with what `on_route` makes of their choices; keeps what it raised."""

    def __init__(self, on_route: OnRoute, entries: Sequence[Entry], num_experts: int) -> None:
        self._on_route, self._entries, self._num_experts = on_route, entries, num_experts
        self.error: BaseException | None = None

    def reply(self, content: memoryview) -> tuple[Kind, Any]:
        layer, entries, own = unpack_choice(content, self._entries)
        own.flags.writeable = False
        try:
            chosen = check_chosen(self._on_route(layer, entries, own), own, layer, self._num_experts)
        except BaseException as error:  # raised where the step is waited for
            self.error = error
            return Kind.FAILED, b""
        return Kind.CHOSEN, b"" if chosen is None else np.ascontiguousarray(chosen, "<i4").tobytes()
