"""Calibrations by hand for tests; no number here was measured."""

from __future__ import annotations

from typing import Any

from hybridlab.calibration.results import CPU, DUAL, MIXED, PLAIN, STREAMED, Calibration, Crossovers, Point, Subject

TOKENS: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
REQUESTS: tuple[int, ...] = (2, 4, 8, 16)
LINK_S = 0.010


def point(path: Any, size: int, layer_s: float, share: float = 0.0, least: int = 0) -> Point:
    """Of a model with 10 layers; repeats within 10%."""
    kind: Any = "decode" if path in (PLAIN, DUAL) else "prefill"
    spread = 0.9 * layer_s, 1.1 * layer_s
    return Point(kind, path, size, share, least, 5, layer_s, *spread, 10 * layer_s, 0.001, 0.002, 0.003, 0.0)


def cpu_s(tokens: int) -> float:
    """As long as the link at 100 tokens."""
    return LINK_S * tokens / 100


def points() -> list[Point]:
    """The CPU by tokens, the link flat, the mixed path as long as the slower of its two halves."""
    found = [point(CPU, n, cpu_s(n)) for n in TOKENS] + [point(STREAMED, n, LINK_S, 1.0, 1) for n in TOKENS]
    found += [point(MIXED, n, max(LINK_S, cpu_s(n)) / 2, 0.5, 1) for n in TOKENS]
    found += [point(MIXED, n, max(0.25 * LINK_S, 0.75 * cpu_s(n)), 0.25, 1) for n in TOKENS]
    found += [point(PLAIN, n, 0.002 + 0.001 * n) for n in REQUESTS]
    return found + [point(DUAL, n, 0.00025 + 0.0015 * n) for n in REQUESTS]


def calibration(given: list[Point] | None = None, evidence: Any = "measured", **subject: Any) -> Calibration:
    own: dict[str, Any] = {
        "model": {"family": "qwen3_moe"},
        "machine": {"cpu": "a CPU", "gpus": ["a GPU"]},
        "device": "cuda",
        "threads": 16,
        "accelerator_threads": 0,
        "link_gb_s": None,
        "precision": "bf16",
        "weight_layout": "rows",
    }
    made = points() if given is None else given
    about = Subject(**{**own, **subject})
    return Calibration(about, "a-model", tuple(made), Crossovers.of(made), 4, "2026-11-25", "c0de", "c0ffee", evidence)
