"""Prefill of one prompt on the CPU against the multiply ceiling of this machine, measured in the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from hybridlab import kernels
from hybridlab.bench.decode import opened
from hybridlab.bench.steps import prompt_step
from hybridlab.errors import ConfigError
from hybridlab.model.weight_layout import WeightLayout
from hybridlab.session import Engine
from hybridlab.spec import ModelSpec


@dataclass(frozen=True)
class PrefillBench:
    """One step that computes a whole prompt of `tokens` tokens; medians over `steps` steps.

    `flop` counts the multiplications and additions of all matrix products: projections, router, routed experts,
    causal attention, and the head of the last token. `multiply_gflop_s` is the median rate of the tier's multiply
    instruction on registers, run between the steps. `fraction` is the median over steps of step rate / rate beside it.
    """

    model: str
    tokens: int
    steps: int
    threads: int
    tier: str
    weight_layout: str
    tokens_per_s: float
    step_s: float
    flop: float
    gflop_s: float
    multiply_gflop_s: float
    multiply_gflop_s_min: float
    multiply_gflop_s_max: float
    fraction: float
    fraction_min: float
    fraction_max: float
    evidence: str = "measured"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        per_token = self.flop / 1e9 / self.tokens
        return "\n".join(
            (
                f"prefill of {self.tokens} tokens on {self.model}: medians of {self.steps} steps, "
                f"{self.threads} threads, tier {self.tier}, weights in {self.weight_layout} ({self.evidence})",
                f"  tokens/s            {self.tokens_per_s:8.1f}   ({self.step_s * 1e3:.0f} ms a step)",
                f"  matrix products     {self.gflop_s:8.0f} GFLOP/s   ({per_token:.2f} GFLOP a token)",
                f"  multiply loop       {self.multiply_gflop_s:8.0f} GFLOP/s   "
                f"({self.multiply_gflop_s_min:.0f} to {self.multiply_gflop_s_max:.0f})",
                f"  fraction of it      {self.fraction:8.2f}   ({self.fraction_min:.2f} to {self.fraction_max:.2f})",
            )
        )

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"


def prefill(
    preset: str = "qwen3-7b-a1b",
    *,
    checkpoint: str | Path | None = None,
    layers: int | None = None,
    dtype: str = "fp8",
    tokens: int = 512,
    threads: int | None = None,
    weight_layout: WeightLayout = "rows",
    steps: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> PrefillBench:
    """Time the prefill of a random prompt on a checkpoint, or on a random one of `preset` in a temporary folder.

    Raises `ConfigError` on impossible numbers.
    """
    for name, value in (("tokens", tokens), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    room = {"kv_tokens": tokens + 16, "token_budget": tokens}
    made = {"layers": layers, "dtype": dtype, "seed": seed}
    with opened(preset, checkpoint, made, progress, threads=threads, weight_layout=weight_layout, **room) as engine:
        return _time_prefill(engine, weight_layout, tokens, steps, seed, progress)


def step_flop(spec: ModelSpec, tokens: int) -> float:
    """Floating-point operations of the matrix products of a prompt's prefill."""
    heads, groups = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    projections = spec.hidden * (2 * heads + 2 * groups)
    experts = spec.hidden * (spec.num_experts + 3 * spec.top_k * spec.moe_intermediate)
    dense = spec.hidden * 3 * spec.dense_intermediate
    per_token = sum(projections + (dense if i in spec.dense_layers else experts) for i in range(spec.num_layers))
    attention = spec.num_layers * 2 * heads * tokens * (tokens + 1) / 2  # scores and values of what a token sees
    return 2.0 * (tokens * per_token + attention + spec.hidden * spec.vocab)


def _time_prefill(
    engine: Engine, weight_layout: str, tokens: int, steps: int, seed: int, progress: bool
) -> PrefillBench:
    from tqdm.auto import trange

    runtime, spec = engine.lone_runtime, engine.spec
    runtime.wait_mapped()
    step, flop = prompt_step(engine, tokens, seed=seed), step_flop(spec, tokens)
    times, ceilings, fractions = [], [], []
    runtime.step(step.program, step.batch)  # warm-up
    for _ in trange(steps, desc="prefill", disable=not progress):
        before = kernels.multiply_rate(engine.threads)
        start = perf_counter()
        runtime.step(step.program, step.batch)
        elapsed = perf_counter() - start
        after = kernels.multiply_rate(engine.threads)
        times.append(elapsed)
        ceilings += [before, after]
        fractions.append(flop / elapsed / ((before + after) / 2))
    step_s = median(times)
    return PrefillBench(
        model=engine.checkpoint.folder.name,
        tokens=tokens,
        steps=steps,
        threads=engine.threads,
        tier=kernels.tier(),
        weight_layout=weight_layout,
        tokens_per_s=tokens / step_s,
        step_s=step_s,
        flop=flop,
        gflop_s=flop / step_s / 1e9,
        multiply_gflop_s=median(ceilings) / 1e9,
        multiply_gflop_s_min=min(ceilings) / 1e9,
        multiply_gflop_s_max=max(ceilings) / 1e9,
        fraction=median(fractions),
        fraction_min=min(fractions),
        fraction_max=max(fractions),
    )
