"""Two ranks with a link each against one, and what the exchanges of experts move: without a GPU.

`python experiments/small_ep/emulated.py OUT [--preset qwen3-7b-a1b] [--layers 4] [--tokens 256] [--ratio 8]`: one
prompt, streamed by one rank and by two (`hybridlab.bench.dslp`). The link is capped so that loading takes `--ratio`
times as long as computing on one rank, since the ranks share the cores of this machine; rows go to `OUT`/dslp.jsonl.
Then the same exchanges of `--sizes` ranks that compute a prompt of the preset tiny (`hybridlab.bench.exchange`): bytes,
by the formulas too, and seconds; rows go to `OUT`/bytes.jsonl. `analysis.py OUT` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import hybridlab as hl
from hybridlab.bench.dslp import dslp
from hybridlab.bench.exchange import rank_steps

MOST_TINY_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="qwen3-7b-a1b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", default="2,4,8", help="ranks whose bytes are counted, on the preset tiny")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"{given.preset}, {given.layers} layers"
        hl.make_checkpoint(folder, given.preset, layers=given.layers)
        found = dslp(folder, tokens=given.tokens, ratio=given.ratio, repeats=given.repeats)
        write(given.out / "dslp.jsonl", found.rows.to_dict("records"))
        tiny = Path(scratch) / "tiny"
        hl.make_checkpoint(tiny, "tiny", progress=False)
        for size in map(int, given.sizes.split(",")):
            tokens = min(given.tokens, MOST_TINY_TOKENS)
            write(given.out / "bytes.jsonl", rank_steps(tiny, size, tokens=tokens, repeats=given.repeats))


def write(path: Path, rows: list[dict[Any, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            print(
                {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )


if __name__ == "__main__":
    main()
