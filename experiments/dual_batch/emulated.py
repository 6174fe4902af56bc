"""Does attention hide behind the experts, and the other way round? One core in the GPU's place, one for the experts.

`python experiments/dual_batch/emulated.py OUT [--preset qwen3-7b-a1b] [--layers N] [--depths 1024,4096,8192]`: decode
steps of the same requests as a plain batch, as a dual batch and with device "cpu", in turns. The deeper the
context, the longer attention takes beside the experts. Rows as of `hybridlab bench decode --device emulated` go to
OUT/decode.jsonl as they are made; analysis.py beside this file says what they mean. Run it on a quiet machine: a dual
batch needs both cores all the time, a plain one never.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from hybridlab.bench.decode_devices import decode
from hybridlab.checkpoint.writer import make_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="qwen3-7b-a1b")
    parser.add_argument("--layers", type=int, help="fewer than the preset has")
    parser.add_argument("--depths", default="1024,4096,8192", help="tokens in the cache of each request")
    parser.add_argument("--batches", default="1,2,4,8", help="requests that decode together")
    parser.add_argument("--steps", type=int, default=48)
    given = parser.parse_args()
    depths, batches = ([int(n) for n in text.split(",")] for text in (given.depths, given.batches))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / (f"{given.preset}, {given.layers} layers" if given.layers else given.preset)
        make_checkpoint(folder, given.preset, layers=given.layers, progress=True)
        for depth in depths:
            print(
                decode(
                    checkpoint=folder,
                    device="emulated",
                    threads=2,
                    accelerator_threads=1,
                    batch=batches,
                    depth=depth,
                    steps=given.steps,
                    beside_cpu=True,
                    out=given.out,
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
