"""Parts of config.json that families have in common: rope, quantisation, stored dtype."""

from __future__ import annotations

from math import log

from hybridlab.checkpoint.jsonfile import Fields
from hybridlab.spec import BLOCK_FP8, RopeSpec

DEFAULT_THETA = 10_000.0
_YARN_KEYS = {
    *("rope_theta", "partial_rotary_factor", "rope_type", "type", "truncate", "original_max_position_embeddings"),
    *("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}


def read_rope(config: Fields, max_positions: int) -> RopeSpec:
    """Rope of either dialect: `rope_theta` + `rope_scaling` (Hub) or `rope_parameters` (transformers 5).

    As in transformers 5, `rope_scaling` wins over `rope_parameters`, and a theta inside over one outside.
    """
    theta = config.number("rope_theta", DEFAULT_THETA)
    rope = config.object("rope_scaling")
    if rope is None or not rope.data:
        rope = config.object("rope_parameters")
    if rope is None or not rope.data:
        return RopeSpec(theta=theta)
    theta = rope.number("rope_theta", theta)
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "1.0 (rotary over the whole head)")
    key = rope.first("rope_type", "type")
    kind = rope.string(key, "default")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind != "yarn":
        raise rope.error(key, "'default' or 'yarn'")
    for unknown in rope.data.keys() - _YARN_KEYS:
        raise rope.error(unknown, f"only yarn's keys: {', '.join(sorted(_YARN_KEYS))}")
    if theta <= 1:
        raise (rope if rope.data.get("rope_theta") is not None else config).error("rope_theta", "a number above 1")
    if not rope.boolean("truncate", True):
        raise rope.error("truncate", "true")
    original = rope.integer("original_max_position_embeddings", max_positions)
    factor = rope.number("factor", max_positions / original)
    if factor < 1:
        raise rope.error("factor", f"a number from 1 (max_position_embeddings / original gives {factor:g})")
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: Fields, factor: float) -> float:
    """YaRN's factor on cos and sin (arXiv 2309.00071, and DeepSeek's mscale form), resolved at load."""
    if rope.data.get("attention_factor") is not None:
        return rope.number("attention_factor")
    mscale = rope.number("mscale", 0.0, positive=False)
    all_dim = rope.number("mscale_all_dim", 0.0, positive=False)

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * log(factor) + 1.0

    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def read_weight_dtype(config: Fields) -> tuple[str, tuple[str, ...]]:
    """(weight_dtype, unquantised modules): "bf16" and (), or "fp8" and `modules_to_not_convert`."""
    key = config.first("dtype", "torch_dtype")
    dtype = config.string(key, "bfloat16").removeprefix("torch.")
    if dtype != "bfloat16":
        raise config.error(key, "'bfloat16' (weights stored as BF16 or block FP8; convert others first)")
    quant = config.object("quantization_config")
    if quant is None:
        return "bf16", ()
    if quant.string("quant_method") != "fp8":
        raise quant.error("quant_method", "'fp8' (block FP8 is the only quantisation supported)")
    if quant.string("fmt", "e4m3") != "e4m3":
        raise quant.error("fmt", "'e4m3'")
    if quant.string("scale_fmt", "float") != "float":
        raise quant.error("scale_fmt", "'float' (ue8m0 scales are not supported)")
    if quant.string("activation_scheme", "dynamic") != "dynamic":
        raise quant.error("activation_scheme", "'dynamic'")
    if quant.string("expert_dtype", "fp8") != "fp8":
        raise quant.error("expert_dtype", "'fp8'")
    block = [BLOCK_FP8, BLOCK_FP8]
    # transformers takes [128, 128] when the key is absent; an explicit null means one scale per tensor.
    if quant.data.get("weight_block_size", block) != block:
        raise quant.error("weight_block_size", f"{block}")
    if quant.strings("modules_to_convert"):
        raise quant.error("modules_to_convert", "no extra modules in FP8")
    return "fp8", quant.strings(quant.first("modules_to_not_convert", "ignored_layers"))
