"""Groups of block-FP8 experts that are multiplied as they lie in their blocks: no widened copy of the weights.

`Fp8GroupedExperts` quantises activations too, so that both operands are FP8. `CodedGroupedExperts` keeps them in BF16.
Each is two products on the device, with routes gathered by the first one (see `triton_grouped`, and its twin).

Legend: T tokens, S slots of a token (top-k), R = T * S routes, E experts here, H hidden.
"""

from __future__ import annotations

from types import ModuleType

import torch

from hybridlab.errors import ConfigError
from hybridlab.model import fp8_twin
from hybridlab.model.cuda_blocks import triton_module, weighted_sum
from hybridlab.model.cuda_experts import GroupedExperts, MakeGroup, Workspace, block_field, sort_routes
from hybridlab.model.expert_block import ExpertBlock
from hybridlab.model.fp8_twin import Rows, Scaled


class Fp8GroupedExperts:
    """Activations quantised to E4M3FN, a scale per 128 columns, before both products."""

    def __init__(self, blocks: torch.Tensor, block: ExpertBlock) -> None:
        self._weights, self._kernels = _CodedWeights(blocks, block), grouped_kernels(blocks.device)

    def __call__(
        self, x_TH: torch.Tensor, local_ids_TS: torch.Tensor, weights_TS: torch.Tensor, experts: int
    ) -> torch.Tensor:
        x = self._kernels.quantise(x_TH)
        return self._weights.apply(self._kernels, x, local_ids_TS, weights_TS, experts)


class CodedGroupedExperts:
    """Activations in BF16, weights widened tile by tile in registers: only those of experts with routes are read."""

    def __init__(self, blocks: torch.Tensor, block: ExpertBlock) -> None:
        self._weights, self._kernels = _CodedWeights(blocks, block), grouped_kernels(blocks.device)

    def __call__(
        self, x_TH: torch.Tensor, local_ids_TS: torch.Tensor, weights_TS: torch.Tensor, experts: int
    ) -> torch.Tensor:
        return self._weights.apply(self._kernels, x_TH.to(torch.bfloat16), local_ids_TS, weights_TS, experts)


class SizedGroupedExperts:
    """In BF16, few tokens read the experts that they are routed to (coded), many are worth widening all of them first.

    Measured on an H100 (results/paper/slp/gemm.jsonl): a layer of qwen3-30b-a3b takes 0.56 ms coded and 1.23 widened
    for 512 tokens, 1.27 and 1.52 for 2,048, 3.81 and 2.47 for 8,192.
    """

    MANY_TOKENS = 2048

    def __init__(self, blocks: torch.Tensor, block: ExpertBlock, workspace: Workspace) -> None:
        self._few, self._many = CodedGroupedExperts(blocks, block), GroupedExperts(blocks, block, workspace)

    def __call__(
        self, x_TH: torch.Tensor, local_ids_TS: torch.Tensor, weights_TS: torch.Tensor, experts: int
    ) -> torch.Tensor:
        group = self._many if len(x_TH) > self.MANY_TOKENS else self._few
        return group(x_TH, local_ids_TS, weights_TS, experts)


class _CodedWeights:
    """Gate, up and down [E, N, K] over blocks (uint8, flat)."""

    def __init__(self, blocks: torch.Tensor, block: ExpertBlock) -> None:
        flat = blocks.view(-1, block.num_bytes)
        self._numbers = torch.arange(len(flat), device=flat.device)
        self._weights = [
            Scaled(block_field(flat, codes, torch.uint8), block_field(flat, scale, torch.float32))
            for codes, scale in zip(block.weights, block.scales, strict=True)
        ]

    def apply(
        self, kernels: ModuleType, x: Rows, local_ids_TS: torch.Tensor, weights_TS: torch.Tensor, experts: int
    ) -> torch.Tensor:
        gate, up, down = (Scaled(w.codes[:experts], w.scale[:experts]) for w in self._weights)
        routes = sort_routes(local_ids_TS, self._numbers[:experts])
        hidden = kernels.hidden(x, routes.tokens_R, gate, up, routes.ends_E)
        return weighted_sum(kernels.product(hidden, down, routes.ends_E), routes.place_TS, weights_TS)


def expert_format(precision: str, block: ExpertBlock, largest: int, device: torch.device) -> MakeGroup:
    """How groups of up to `largest` experts compute in `precision`: "fp8" (whose weights must be FP8) or "bf16".

    Raises `ConfigError` if "fp8" lacks Triton.
    """
    if precision == "fp8":
        try:
            grouped_kernels(device)
        except ImportError as error:
            raise ConfigError(f"precision is 'fp8', which needs Triton ({error}); use 'bf16'") from None
        return lambda blocks: Fp8GroupedExperts(blocks, block)
    workspace = Workspace(largest, block, device)
    if block.scales and device.type == "cuda" and _has_fp8(device) and triton_module("triton_grouped") is not None:
        return lambda blocks: SizedGroupedExperts(blocks, block, workspace)
    return lambda blocks: GroupedExperts(blocks, block, workspace)


def _has_fp8(device: torch.device) -> bool:
    """Whether Triton 3.6 compiles products of BF16 and FP8 operands: from Hopper on."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def grouped_kernels(device: torch.device) -> ModuleType:
    """Triton's kernels on a GPU, their twin elsewhere."""
    if device.type != "cuda":
        return fp8_twin
    from hybridlab.model import triton_grouped

    return triton_grouped
