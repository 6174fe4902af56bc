"""What a model and a machine are, as frozen data. No torch, no jax: strategies read these."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod

NEVER = 2**31 - 1
"""A threshold in tokens or requests that no step reaches."""

BLOCK_FP8 = 128
"""Edge of the square blocks that share one FP8 scale (DeepSeek-V3 and Qwen3 FP8 checkpoints)."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: base `theta`; `kind` is "default" or "yarn" (then `factor` etc. apply)."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class KVEntry:
    """One tensor that the KV cache keeps per token and layer.

    GQA models keep ("k", (num_kv_heads, head_dim)) and ("v", ...); MLA models keep a latent and a rope part.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and rules of a decoder-only Mixture-of-Experts model; sizes are in elements."""

    family: str
    num_layers: int
    hidden: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    moe_intermediate: int
    dense_intermediate: int
    dense_layers: frozenset[int]
    norm_topk_prob: bool
    rms_norm_eps: float
    rope: RopeSpec
    max_positions: int
    tie_embeddings: bool
    attention_bias: bool
    eos_token_ids: tuple[int, ...]
    kv_entries: tuple[KVEntry, ...]
    weight_dtype: str
    """"bf16" or "fp8": how the large linear layers are stored."""
    unquantised: tuple[str, ...] = ()
    """Module names of an FP8 checkpoint that stay in BF16 (`modules_to_not_convert`)."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    @property
    def kv_elements_per_token(self) -> int:
        """KV cache elements that one token takes over all layers."""
        return self.num_layers * sum(prod(entry.shape) for entry in self.kv_entries)

    def is_quantised(self, module: str) -> bool:
        """Whether a linear layer (dotted module name) is stored in FP8.

        An entry of `unquantised` excludes the module it names, all modules below it, and, as transformers has it,
        modules whose dotted name ends with it.
        """
        if self.weight_dtype != "fp8":
            return False
        return not any(
            module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
            for entry in self.unquantised
        )

    @cached_property
    def expert_dtype(self) -> str:
        """ "fp8" if the routed experts of every layer are stored so, else "bf16": room for one is room for any."""
        first = (f"model.layers.{layer}.mlp.experts.0.gate_proj" for layer in self.moe_layers)
        return "fp8" if self.weight_dtype == "fp8" and all(map(self.is_quantised, first)) else "bf16"

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of one expert (gate, up, down and, for FP8, their scales as F32)."""
        n, k = self.moe_intermediate, self.hidden
        if self.expert_dtype == "bf16":
            return 3 * n * k * 2
        return 3 * (n * k + 4 * ceil(n / BLOCK_FP8) * ceil(k / BLOCK_FP8))


@dataclass(frozen=True)
class HardwareSpec:
    """What a machine can do. Rates are measured by `hybridlab.hardware` or come from a profile."""

    name: str
    device: str
    """"cpu", "emulated" or "cuda"."""
    num_cores: int
    host_memory_bytes: int
    gpu_memory_bytes: int = 0
    host_read_gb_s: float | None = None
    link_gb_s: float | None = None
    stream_from_tokens: int | None = None
    """Tokens of a step from which streaming its experts is faster than computing them on the CPU, where measured.

    This and the thresholds below come from `hybridlab calibrate`: None where nothing was measured, `NEVER` where the
    path was never faster.
    """
    mixed_from_tokens: int | None = None
    """Tokens of a step from which streaming a share of the experts while the CPU computes the rest is faster than the
    CPU alone."""
    mixed_to_tokens: int | None = None
    """Tokens of a step from which streaming all experts is faster than a share of them (`stream_from_tokens` if the
    mixed path is `NEVER` faster)."""
    mixed_share: float | None = None
    """Share of a layer's streamed experts that cross the link on the mixed path, 0 to 1."""
    min_expert_tokens: int | None = None
    """Tokens that an arrived expert must have to be computed on the GPU on the mixed path; the CPU takes the others."""
    dual_batch_from_requests: int | None = None
    """Requests of a decode step from which two microbatches are faster than one."""
    dual_batch_to_requests: int | None = None
    """Requests from which one microbatch is faster again: two of them read the experts that they share twice."""
    calibrated: str = ""
    """When and by which code the thresholds were measured; empty where they were not."""
    evidence: str = "measured"
