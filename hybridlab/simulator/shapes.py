"""A model as the numbers that its costs follow from, of a `ModelSpec` or of a public model by name."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from math import isfinite, prod

from hybridlab.errors import ConfigError
from hybridlab.spec import KVEntry, ModelSpec, RopeSpec

FP8_BITS = 8 + 32 / 128**2
"""With an F32 scale for each block of 128 x 128."""


@dataclass(frozen=True)
class ModelShape:
    """Elements of weights (of a layer, of an expert), bits per weight, and what attention takes of a token.

    Floats, so that they can be arrays of configurations. `kv_bytes` of a token in one layer's cache (BF16), `pair_flop`
    of a query token and a key token in one layer. Where keys and values are kept compressed (MLA), attention may also
    expand them first: `pair_flop_expanded`, and `expand_weights` for each token of the context.
    """

    hidden: float
    vocab: float
    attention_weights: float
    kv_bytes: float
    pair_flop: float
    pair_flop_expanded: float
    expand_weights: float
    router_weights: float
    expert_weights: float
    shared_weights: float
    mlp_weights: float
    expert_bits: float
    dense_bits: float
    head_bits: float = 16.0

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelShape:
        """Of a model with grouped-query attention, experts in its own format."""
        h, heads, groups = spec.hidden, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        expert = 3 * h * spec.moe_intermediate
        return cls(
            hidden=float(h),
            vocab=float(spec.vocab),
            attention_weights=float(h * (2 * heads + 2 * groups)),
            kv_bytes=2.0 * sum(prod(entry.shape) for entry in spec.kv_entries),
            pair_flop=4.0 * heads,
            pair_flop_expanded=4.0 * heads,
            expand_weights=0.0,
            router_weights=float(h * spec.num_experts),
            expert_weights=float(expert),
            shared_weights=0.0,
            mlp_weights=3.0 * h * spec.dense_intermediate,
            expert_bits=8.0 * spec.expert_bytes / expert,
            dense_bits=FP8_BITS if spec.weight_dtype == "fp8" else 16.0,
        )

    def with_bits(self, expert_bits: float, dense_bits: float | None = None) -> ModelShape:
        """The same model at other bits per weight (4.8 for Q4_K_M, ...); raises `ConfigError` for impossible ones."""
        for name, bits in (("expert_bits", expert_bits), ("dense_bits", dense_bits)):
            number = isinstance(bits, int | float) and not isinstance(bits, bool) and isfinite(bits)
            if bits is not None and not (number and 0 < bits <= 64):
                raise ConfigError(f"{name} is {bits!r}, expected a number above 0, at most 64")
        return replace(self, expert_bits=expert_bits, dense_bits=expert_bits if dense_bits is None else dense_bits)

    def weight_bytes(self, spec: ModelSpec) -> tuple[float, float]:
        """(of all experts, of everything else), as stored."""
        moe, dense = len(spec.moe_layers), len(spec.dense_layers)
        experts = moe * spec.num_experts * self.expert_weights * self.expert_bits / 8
        layers = spec.num_layers * self.attention_weights + dense * self.mlp_weights + moe * self.shared_weights
        tables = self.vocab * self.hidden * self.head_bits / 8 * (1 if spec.tie_embeddings else 2)
        return experts, layers * self.dense_bits / 8 + moe * self.router_weights * 2 + tables


@cache
def public_models() -> dict[str, tuple[ModelSpec, ModelShape]]:
    """Models by their public names, FP8 weights: shapes alone, no checkpoint is needed or read."""
    text = files("hybridlab.simulator").joinpath("public_models.csv").read_text(encoding="utf-8")
    return {row["model"]: _public(row) for row in csv.DictReader(text.splitlines())}


def _public(row: dict[str, str]) -> tuple[ModelSpec, ModelShape]:
    n = {key: int(value or 0) for key, value in row.items() if key not in ("model", "attention", "note")}
    h, heads = n["hidden"], n["heads"]
    latent = row["attention"] == "MLA"
    if latent:
        rope, nope, v, kv, q = n["rope_dim"], n["nope_dim"], n["v_dim"], n["kv_lora"], n["q_lora"]
        queries = h * q + q * heads * (nope + rope) if q else h * heads * (nope + rope)
        attention = queries + h * (kv + rope) + kv * heads * (nope + v) + heads * v * h
        pair_flop = 2 * heads * (2 * kv + rope)  # absorbed: scores and values in the latent space
        pair_flop_expanded, expand = 2 * heads * (nope + rope + v), kv * heads * (nope + v)
        entries = (KVEntry("latent", (kv,)), KVEntry("rope", (rope,)))
    else:
        d, groups = n["head_dim"], n["kv_heads"]
        attention, pair_flop = h * d * (2 * heads + 2 * groups), 4 * heads * d
        pair_flop_expanded, expand = pair_flop, 0
        entries = (KVEntry("k", (groups, d)), KVEntry("v", (groups, d)))
    spec = ModelSpec(
        family="public",
        num_layers=n["layers"],
        hidden=h,
        vocab=n["vocab"],
        num_heads=heads,
        num_kv_heads=n["kv_heads"],
        head_dim=n["head_dim"],
        num_experts=n["experts"],
        top_k=n["top_k"],
        moe_intermediate=n["moe_intermediate"],
        dense_intermediate=n["dense_intermediate"],
        dense_layers=frozenset(range(n["dense_layers"])),
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        rope=RopeSpec(),
        max_positions=2**18,
        tie_embeddings=False,
        attention_bias=False,
        eos_token_ids=(),
        kv_entries=entries,
        weight_dtype="fp8",
    )
    shape = ModelShape(
        hidden=float(h),
        vocab=float(n["vocab"]),
        attention_weights=float(attention),
        kv_bytes=2.0 * sum(prod(entry.shape) for entry in entries),
        pair_flop=float(pair_flop),
        pair_flop_expanded=float(pair_flop_expanded),
        expand_weights=float(expand),
        router_weights=float(h * n["experts"]),
        expert_weights=3.0 * h * n["moe_intermediate"],
        shared_weights=3.0 * h * n["moe_intermediate"] * n["shared_experts"],
        mlp_weights=3.0 * h * n["dense_intermediate"],
        expert_bits=FP8_BITS,
        dense_bits=FP8_BITS,
    )
    return spec, shape
