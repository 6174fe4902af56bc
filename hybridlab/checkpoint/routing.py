"""How popular the experts of a made checkpoint are: recorded curves, and router biases that reproduce them.

A recorded curve is the share of tokens that chose each expert, sorted from hot to cold. `inclusion` carries
it over to another number of experts E: the sorted curve is read at the rank quantiles (i + 0.5) / E by linear
interpolation and scaled so that it sums to top_k. No expert can be chosen by more than all tokens, so values
are capped and the excess is spread over the others in proportion. Which expert gets which rank is a seeded
random permutation per layer.

Qwen3's router has no bias. A made checkpoint gets one from a hidden channel that no layer writes to: every
token carries the same value there, and the router's column of that channel acts as the bias. `fit_bias` finds
the bias for independent Gaussian logits, which is what random router rows give.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files
from statistics import NormalDist

import numpy as np

from hybridlab.checkpoint.randomness import normal_quantiles, random_source
from hybridlab.errors import CheckpointError
from hybridlab.spec import ModelSpec

ROUTINGS = ("uniform", "olmoe", "mixtral")
"""Kinds of expert popularity: all alike, strongly skewed (OLMoE on code), nearly flat (Mixtral on code)."""

MAX_INCLUSION = 0.97
"""Largest share of tokens that one expert may get: the bias for 1.0 would be infinite."""

FIT_TOKENS, FIT_STEPS = 16384, 16


@cache
def recorded_curves(routing: str) -> dict[float, tuple[float, ...]]:
    """Relative depth (0 first layer, 1 last) -> counts over the mean count, sorted from hot to cold.

    Source: allenai/OLMoE, scripts/routing_output (Apache-2.0), GitHub code, top-k counts of layers 0, 7, 15.
    """
    if routing not in ROUTINGS or routing == "uniform":
        raise CheckpointError(f"routing {routing!r} is not recorded, expected one of {ROUTINGS[1:]}")
    counts: dict[int, list[int]] = {}
    text = (files("hybridlab.checkpoint") / "data" / "expert_counts.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        if row["routing"] == routing:
            counts.setdefault(int(row["layer"]), []).append(int(row["count"]))
    last = max(counts)
    return {
        layer / last: tuple(sorted((c * len(curve) / sum(curve) for c in curve), reverse=True))
        for layer, curve in counts.items()
    }


def inclusion(routing: str, num_experts: int, top_k: int, depth: float) -> np.ndarray:
    """Share of tokens that choose the expert of each rank, hot to cold: float64 [num_experts], sum top_k.

    `depth` runs from 0 (first layer) to 1 (last) and picks the nearest recorded layer.
    """
    if routing == "uniform" or top_k == num_experts:
        return np.full(num_experts, top_k / num_experts)
    curves = recorded_curves(routing)
    curve = np.array(curves[min(curves, key=lambda d: abs(d - depth))])
    at = (np.arange(num_experts) + 0.5) / num_experts
    share = np.interp(at, (np.arange(len(curve)) + 0.5) / len(curve), curve)
    share = np.maximum(share, 1e-3)
    # With nearly all experts chosen the cap may sit below the mean; then every share is alike.
    cap = max(MAX_INCLUSION, top_k / num_experts)
    share *= top_k / share.sum()
    for _ in range(num_experts):
        over = share >= cap
        share[over] = cap
        if over.all() or share.sum() >= top_k - 1e-12:
            break
        share[~over] *= (top_k - cap * over.sum()) / share[~over].sum()
    return share


def expert_inclusion(spec: ModelSpec, routing: str, seed: int = 0) -> dict[int, np.ndarray]:
    """Target share of tokens per expert of each MoE layer, as `make_checkpoint` gives it to the routers."""
    out = {}
    for layer in spec.moe_layers:
        share = inclusion(routing, spec.num_experts, spec.top_k, layer / max(spec.num_layers - 1, 1))
        ranks = np.argsort(random_source(f"{seed}/expert ranks/{layer}").random_raw(spec.num_experts))
        out[layer] = share[ranks]
    return out


def fit_bias(share: np.ndarray, top_k: int) -> np.ndarray:
    """Bias per expert so that expert e is among the top_k of (bias + N(0, 1)) for share[e] of the tokens.

    Starts at the bias for a fixed threshold, Phi^-1(share), and corrects it by what a fixed sample of tokens
    then chooses. float64 [E], mean 0, in units of the logits' standard deviation.
    """
    if top_k == len(share) or np.ptp(share) < 1e-12:
        return np.zeros(len(share))
    noise = _sample_noise(len(share))
    target = _probit(share)
    bias = target.copy()
    for _ in range(FIT_STEPS):
        chosen = top_k_mask(noise + bias, top_k).mean(axis=0)
        bias += 0.7 * (target - _probit(chosen))
    return bias - bias.mean()


def sum_of_squared_weights(bias: np.ndarray, top_k: int, logit_std: float) -> float:
    """Mean over tokens of the summed squares of the top_k softmax weights, normalised to sum 1."""
    logits = (_sample_noise(len(bias)) + bias) * logit_std
    kept = np.partition(logits, len(bias) - top_k, axis=1)[:, len(bias) - top_k :]
    weights = np.exp(kept - kept.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return float((weights**2).sum(axis=1).mean())


def top_k_mask(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Which experts each token chooses: bool [T, E] of float [T, E] (ties at the threshold all count)."""
    place = logits.shape[1] - top_k
    return logits >= np.partition(logits, place, axis=1)[:, place : place + 1]


def _sample_noise(num_experts: int) -> np.ndarray:
    words = random_source("router fit").random_raw(FIT_TOKENS * num_experts // 4 + 1).view(np.uint16)
    return normal_quantiles(1 << 16)[words[: FIT_TOKENS * num_experts]].reshape(FIT_TOKENS, num_experts)


def _probit(share: np.ndarray) -> np.ndarray:
    inverse = NormalDist().inv_cdf
    low = 0.5 / FIT_TOKENS
    return np.array([inverse(min(max(p, low), 1 - low)) for p in share])
