"""Which matrices and layers `hybridlab bench kernels` multiplies: those of public models and of our presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hybridlab.checkpoint.presets import PRESETS, preset_spec
from hybridlab.errors import ConfigError
from hybridlab.sections import did_you_mean

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
"""Tokens multiplied at once, M: from one request that decodes to a long prompt."""


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one model's layer: H wide, experts I wide, `top_k` of `experts` for each token."""

    model: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def matrices(self) -> tuple[MatrixShape, MatrixShape]:
        """Gate (as up) and down of one expert."""
        return (
            MatrixShape(self.model, "gate_up", self.intermediate, self.hidden),
            MatrixShape(self.model, "down", self.hidden, self.intermediate),
        )

    def expert_bytes(self, element_bytes: int) -> int:
        """Of gate, up and down, without scales."""
        return 3 * self.hidden * self.intermediate * element_bytes


@dataclass(frozen=True)
class MatrixShape:
    """One weight matrix W[n, k]: k inputs, n outputs."""

    model: str
    matrix: str
    n: int
    k: int


# Sizes of the public config.json of deepseek-ai/DeepSeek-V3 and Qwen/Qwen3-235B-A22B.
_PUBLIC = (
    LayerShape("deepseek-v3", 7168, 2048, 256, 8),
    LayerShape("qwen3-235b-a22b", 4096, 1536, 128, 8),
)


def _of_preset(name: str) -> LayerShape:
    spec = preset_spec(name)
    return LayerShape(name, spec.hidden, spec.moe_intermediate, spec.num_experts, spec.top_k)


LAYERS: Mapping[str, LayerShape] = MappingProxyType(
    {layer.model: layer for layer in (*_PUBLIC, *(_of_preset(name) for name in reversed(PRESETS)))}
)
"""Model -> its layer; the largest first."""


def layers_of(models: Sequence[str] | None) -> tuple[LayerShape, ...]:
    """The layers of these models, by default of all. Raises ConfigError for a name that is unknown or none at all."""
    if models is None:
        return tuple(LAYERS.values())
    if isinstance(models, str):
        models = (models,)
    if not models:
        raise ConfigError(f"bench kernels: shapes: expected some of {', '.join(LAYERS)}, got none")
    for name in models:
        if name not in LAYERS:
            raise ConfigError(f"bench kernels: shapes: unknown model {name!r}{did_you_mean(str(name), LAYERS)}")
    return tuple(LAYERS[name] for name in dict.fromkeys(models))


def matrices_of(layers: Sequence[LayerShape]) -> tuple[MatrixShape, ...]:
    """The distinct matrices of these layers: models that share a shape are measured once, under the first name."""
    found: dict[tuple[int, int], MatrixShape] = {}
    for layer in layers:
        for matrix in layer.matrices:
            found.setdefault((matrix.n, matrix.k), matrix)
    return tuple(found.values())


def distinct_layers(layers: Sequence[LayerShape]) -> tuple[LayerShape, ...]:
    """Layers with experts of different sizes; the first of equals stays."""
    return tuple({(one.hidden, one.intermediate): one for one in reversed(layers)}.values())[::-1]
