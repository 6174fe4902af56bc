"""Does the link hide behind computing? One core in the GPU's place, one to copy, the link capped to chosen ratios.

`python experiments/slp/emulated.py OUT [--preset qwen3-7b-a1b] [--layers 6] [--tokens 512]`: for each ratio of loading
to computing, both measured alone in the same run, the time of the streamed prompt over the bound
max(load, compute) + the first fill. Rows go to `OUT`/emulated.jsonl as they are made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import hybridlab as hl
from hybridlab.bench.devices import origin
from hybridlab.bench.steps import loads_alone, prompt_step, take_turns, timed
from hybridlab.checkpoint.writer import make_checkpoint

OVERLAPS = ("prefetch", "sequential")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="qwen3-7b-a1b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ratios", default="0.5,1,2")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / given.preset
        make_checkpoint(folder, given.preset, layers=given.layers, progress=True)
        spec = hl.open_checkpoint(folder).spec
        size = len(spec.moe_layers) * spec.num_experts * spec.expert_bytes
        with _load(folder, given.tokens, "all_resident", "prefetch", None) as engine:
            compute_s = statistics.median(_times(engine, given))
        caps = [None, *(size / (float(ratio) * compute_s) / 1e9 for ratio in given.ratios.split(","))]
        for cap in caps:
            for parts in (1, 2):
                for overlap in OVERLAPS:
                    _write(given.out, _row(folder, given, cap, parts, overlap))


def _row(folder: Path, given: argparse.Namespace, cap: float | None, parts: int, overlap: str) -> dict[str, Any]:
    ring = {"name": "streamed", "stream_from_tokens": 1, "ring_slots": 2 * parts, "parts_per_layer": parts}
    with _load(folder, given.tokens, "all_resident", "prefetch", cap) as engine:
        before_s = _times(engine, given)
    found: dict[str, list[float]] = {"loads": [], "step": []}
    with _load(folder, given.tokens, ring, overlap, cap) as engine:
        whole = prompt_step(engine, given.tokens)
        calls = {"loads": partial(timed, engine, loads_alone(whole)), "step": partial(timed, engine, whole)}
        for name, step in take_turns(calls, given.repeats):
            found[name].append(step.step_s)
    with _load(folder, given.tokens, "all_resident", "prefetch", cap) as engine:
        after_s = _times(engine, given)
    compute_s = statistics.median((*before_s, *after_s))
    step_s, load_s = statistics.median(found["step"]), statistics.median(found["loads"])
    first_fill_s = load_s / engine.spec.num_layers / parts
    bound_s = max(load_s, compute_s) + first_fill_s
    return {
        "overlap": overlap,
        "parts_per_layer": parts,
        "link_gb_s": cap,
        "preset": given.preset,
        "layers": given.layers,
        "tokens": given.tokens,
        "compute_s": compute_s,
        "load_s": load_s,
        "load_over_compute": load_s / compute_s,
        "first_fill_s": first_fill_s,
        "step_s": step_s,
        "step_s_min": min(found["step"]),
        "step_s_max": max(found["step"]),
        "over_bound": step_s / bound_s,
        "evidence": "emulated",
        **origin("emulated"),
    }


def _times(engine: hl.Engine, given: argparse.Namespace) -> list[float]:
    call = partial(timed, engine, prompt_step(engine, given.tokens))
    return [step.step_s for _, step in take_turns({"step": call}, given.repeats)]


def _load(folder: Path, tokens: int, placement: Any, overlap: str, cap: float | None) -> hl.Engine:
    room: dict[str, Any] = {"token_budget": tokens, "kv_tokens": tokens + 16}
    return hl.load(folder, device="emulated", placement=placement, overlap=overlap, link_gb_s=cap, quiet=True, **room)


def _write(out: Path, row: dict[str, Any]) -> None:
    with (out / "emulated.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


if __name__ == "__main__":
    main()
