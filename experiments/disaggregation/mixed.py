"""What one long prompt does to requests that decode: one worker, unchunked and chunked, against a worker for each.

`python experiments/disaggregation/mixed.py OUT [--preset qwen3-7b-a1b] [--layers 6] [--prompt 2048]`: all systems on
`--threads` threads. For each system and number of decodes: the long prompt alone, the decodes alone, and both, in
turns (`hybridlab.bench.interference`). One row per run goes to `OUT`/mixed.jsonl; `analysis.py OUT` makes the tables.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import hybridlab as hl
from hybridlab.bench.interference import interference


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="qwen3-7b-a1b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the long prompt")
    parser.add_argument("--output", type=int, default=192, help="tokens that each decoding request draws")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--decodes", default="0,1,2,3,4,5,6")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="or call it again: rows are added")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"{given.preset}, {given.layers} layers"
        hl.make_checkpoint(folder, given.preset, layers=given.layers)
        interference(
            folder,
            prompt_tokens=given.prompt,
            output_tokens=given.output,
            chunk_tokens=given.chunk,
            decodes=[int(count) for count in given.decodes.split(",")],
            threads=given.threads,
            repeats=given.repeats,
            out=given.out,
        )


if __name__ == "__main__":
    main()
