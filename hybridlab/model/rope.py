"""Rotary position embedding in the half-split layout of Llama and Qwen."""

from __future__ import annotations

import math

import torch

from hybridlab.spec import RopeSpec


class Rope:
    """cos and sin tables, float32 [positions, head_dim / 2], grown when a later position is met."""

    def __init__(self, spec: RopeSpec, head_dim: int) -> None:
        self._inv_freq, self._factor = _frequencies(spec, head_dim)
        self._cos = self._sin = torch.empty(0, head_dim // 2)
        self._last = (self._cos, self._sin)
        self._last_positions: torch.Tensor | None = None

    def tables(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [T, head_dim / 2]. The last result is kept: all layers of a step ask alike."""
        if positions_T is not self._last_positions:
            needed = int(positions_T.max()) + 1
            if needed > len(self._cos):
                # Angles in float32, as the reference implementation has them.
                size = max(needed, 2 * len(self._cos), 1024)
                angles = torch.arange(size, dtype=torch.float32)[:, None] * self._inv_freq
                self._cos, self._sin = angles.cos() * self._factor, angles.sin() * self._factor
            self._last_positions = positions_T
            self._last = self._cos[positions_T], self._sin[positions_T]
        return self._last


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
