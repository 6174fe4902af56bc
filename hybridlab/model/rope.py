"""Rotary position embedding in the half-split layout of Llama and Qwen."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch

from hybridlab.spec import RopeSpec

MICROBATCHES = 4
"""Microbatches whose tables are kept: they take turns within a step."""


class Rope:
    """cos and sin tables, float32 [positions, head_dim / 2], grown when a later position is met."""

    def __init__(
        self, spec: RopeSpec, head_dim: int, max_positions: int, place: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._inv_freq, self._factor = _frequencies(spec, head_dim)
        self._cos = self._sin = torch.empty(0, head_dim // 2)
        self._place, self._max_positions = place, max_positions
        self._placed: tuple[torch.Tensor, torch.Tensor] | None = None
        self._recent: deque[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = deque(maxlen=MICROBATCHES)

    def start(self, positions_T: torch.Tensor) -> None:
        """A step begins: its tables are made anew, also if it brings a tensor of before with new positions in it."""
        kept = [item for item in self._recent if item[0] is not positions_T]
        self._recent = deque([*kept, (positions_T, self._make(positions_T))], MICROBATCHES)

    def tables(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [T, head_dim / 2], where `place` puts them; positions int64 [T], as given to `start`."""
        for positions, tables in self._recent:
            if positions is positions_T:
                return tables
        self.start(positions_T)
        return self._recent[-1][1]

    def _make(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if positions_T.is_cuda:
            cos, sin = self._whole()
            return cos[positions_T], sin[positions_T]
        self._grow(int(positions_T.max()) + 1)
        return self._place(self._cos[positions_T]), self._place(self._sin[positions_T])

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables of all positions on the device: positions there are not looked at, that would wait for them."""
        if self._placed is None:
            self._grow(self._max_positions)
            self._placed = self._place(self._cos), self._place(self._sin)
        return self._placed

    def _grow(self, needed: int) -> None:
        if needed > len(self._cos):
            # Angles in float32, as the reference implementation has them.
            size = max(needed, 2 * len(self._cos), 1024)
            angles = torch.arange(size, dtype=torch.float32)[:, None] * self._inv_freq
            self._cos, self._sin = angles.cos() * self._factor, angles.sin() * self._factor


def _frequencies(spec: RopeSpec, dim: int) -> tuple[torch.Tensor, float]:
    inv_freq = 1.0 / spec.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if spec.kind == "default":
        return inv_freq, 1.0

    # YaRN (arXiv 2309.00071): low frequencies are interpolated, high ones kept, a ramp between.
    def correction(rotations: float) -> float:
        return dim * math.log(spec.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low = max(math.floor(correction(spec.beta_fast)), 0)
    high = min(math.ceil(correction(spec.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    mixed = inv_freq / spec.factor * ramp + inv_freq * (1 - ramp)
    factor = spec.attention_factor
    if factor is None:
        factor = 0.1 * math.log(spec.factor) + 1.0 if spec.factor > 1 else 1.0
    return mixed, factor
