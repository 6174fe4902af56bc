"""One long prompt beside decodes, with GPUs: one worker, whole prompts and chunks, against a worker for each.

`python experiments/disaggregation/gpu.py OUT --checkpoint PATH` (or `--preset qwen3-30b-a3b`: made in a temporary
folder). The prefill worker and the decode worker share GPU 0, unless `--gpus 0,1` gives each its own. All experts are
in host memory, once: they are held, and every worker attaches to them. The decodes alone, the prompt alone and both, in
turns, for at most `--seconds` in all. OUT/gpu.jsonl gets a row per run as it is made, OUT/gpu.csv has the same, and
OUT/gpu.json says machine, versions, commit and what was asked for. Exit status 1 if a system could not be measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import hybridlab as hl
from hybridlab import weights_held
from hybridlab.bench.devices import origin
from hybridlab.bench.interference import CHUNKS, LONG, LONG_OUTPUT, SHORT_PROMPT, SPLIT, WHOLE, latencies
from hybridlab.bench.one_copy import PACKED, mapped_bytes, private, weights_bytes
from hybridlab.engine.worker_process import WorkerProcess
from hybridlab.engine.workers import Workers
from hybridlab.errors import HybridlabError
from hybridlab.hardware import detect
from hybridlab.provenance import code_version, machine, versions
from hybridlab.weights_sharing import hold

Runs = Iterator[dict[str, Any]]


class Log:
    """Rows in OUT, as they are made."""

    def __init__(self, out: Path, labels: dict[str, Any]) -> None:
        self._out, self._labels, self._rows = out, labels, []

    def add(self, row: dict[str, Any]) -> None:
        row = {**row, **self._labels}
        self._rows.append(row)
        with (self._out / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        with (self._out / "gpu.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(key for row in self._rows for key in row)))
            table.writeheader()
            table.writerows(self._rows)
        names = ("system", "mode", "repeat", "error")
        print(*(f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in row.items()
                if key in names or isinstance(value, float)), sep=", ")  # fmt: skip
        sys.stdout.flush()


def main(words: Sequence[str] | None = None) -> int:
    given = parsed(words)
    given.out.mkdir(parents=True, exist_ok=True)
    deadline_s = perf_counter() + given.seconds
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.checkpoint or Path(scratch) / given.preset
        if not folder.exists():
            hl.make_checkpoint(folder, given.preset, layers=given.layers)
        prefill, decode = given.gpus
        sharing = f"both workers share GPU {prefill}" if prefill == decode else f"GPUs {prefill} and {decode}"
        told = {"model": folder.name, "device": given.device, "prompt_tokens": given.prompt, "gpus_of_workers": sharing}
        log = Log(given.out, {**told, "chunk_tokens": given.chunk, "evidence": "measured", **origin(given.device)})
        about = {"machine": machine(gpu=given.device == "cuda"), "versions": versions(), "code": code_version()}
        asked = {key: str(value) for key, value in vars(given).items()}
        (given.out / "gpu.json").write_text(json.dumps({**about, "asked": asked, "gpus_of_workers": sharing}, indent=2))
        holds = given.device == "cuda" and hold_experts(folder, log)
        try:
            return measure(folder, given, log, deadline_s)
        finally:
            if holds:
                weights_held.release(folder)


def hold_experts(folder: Path, log: Log) -> bool:
    """Whether they are held from here on; where they cannot be, each engine fills memory for its own workers."""
    begin_s = perf_counter()
    if weights_held.find(folder, "blocks") is not None:
        return False
    try:
        hold(folder, idle_s=900.0, layout="blocks", threads=detect().num_cores)
    except HybridlabError as error:
        log.add({"mode": "hold", "error": f"{type(error).__name__}: {error}"})
        return False
    log.add({"mode": "hold", "load_s": perf_counter() - begin_s})
    return True


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda", help="cpu to try the script out")
    parser.add_argument("--gpus", default="0,0", help="of the prefill worker, of the decode worker")
    parser.add_argument("--prompt", type=int, default=16384, help="tokens of the long prompt")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of the prompt beside decodes, on one worker")
    parser.add_argument("--decodes", type=int, default=4)
    parser.add_argument("--output", type=int, default=256, help="tokens that each decoding request draws")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of all workers together; default: all cores")
    parser.add_argument("--prefill-threads", type=int, default=2, help="of them the prefill worker's, which streams")
    parser.add_argument("--vram-gb", type=float, help="of each GPU; default: all")
    parser.add_argument("--seconds", type=float, default=210.0, help="no run begins after these")
    given = parser.parse_args(words)
    try:
        given.gpus = tuple(int(word) for word in given.gpus.split(","))
        assert len(given.gpus) == 2
    except (ValueError, AssertionError):
        parser.error(f"--gpus: expected two numbers as in 0,0, got {given.gpus!r}")
    return given


def measure(folder: Path, given: argparse.Namespace, log: Log, deadline_s: float) -> int:
    """The status: 1 if an engine could not be loaded or a request failed."""
    threads = given.threads or detect().num_cores
    # The step holds the prompt and those that decode beside it.
    room = {"token_budget": given.prompt + 64, "kv_tokens": 2 * given.prompt + 8 * (SHORT_PROMPT + given.output)}
    options: dict[str, Any] = {"device": given.device, "prefix_cache": False, **room}
    own: list[dict[str, Any]] = [{}, {}]
    if given.device == "cuda":
        streamed = {"name": "streamed", "stream_from_tokens": min(1024, given.chunk)}
        options |= {"placement": streamed, "overlap": "prefetch", "vram_gb": given.vram_gb}
        own = [{"gpu": gpu} for gpu in given.gpus]
    prefill = min(given.prefill_threads, max(1, threads - 1))
    workers = {
        "prefill": {"threads": prefill, **own[0]},
        "decode": {"threads": max(1, threads - prefill), **own[1]},
    }
    one = {WHOLE: "fcfs", CHUNKS: {"name": "chunked_prefill", "chunk_tokens": given.chunk}}
    split = {SPLIT: {"name": "paper", "short_tokens": given.prompt, "chunk_tokens": given.chunk}}
    engines = [({"threads": threads, "worker": "process"}, one), ({"workers": workers}, split)]
    status = 0
    for number, (how, schedulers) in enumerate(engines):
        # The first engine leaves the other one its time.
        left_s = deadline_s - perf_counter()
        until_s = perf_counter() + left_s / (len(engines) - number)
        try:
            begin_s, before = perf_counter(), gpu_used_gb(given.gpus)
            with hl.load(folder, **options, **how) as engine:
                log.add({"system": " / ".join(schedulers), "mode": "load", "load_s": perf_counter() - begin_s})
                for row in runs(engine, schedulers, given, until_s):
                    log.add(row)
                log.add({"system": " / ".join(schedulers), "mode": "memory", **memory(engine)})
                log.add({"system": " / ".join(schedulers), "mode": "GPU memory", **gpu_memory(engine, given, before)})
        except HybridlabError as error:
            log.add({"system": " / ".join(schedulers), "error": f"{type(error).__name__}: {error}"})
            status = 1
    return status


def runs(engine: hl.Engine, schedulers: dict[str, Any], given: argparse.Namespace, until_s: float) -> Runs:
    """Rows of all systems of an engine, in turns: what drifts does so for all of them."""
    for scheduler in schedulers.values():  # graphs are captured and memory is touched then
        engine.serve(requests(engine, given, 2, 0.0, output=8), scheduler)
    for repeat in range(given.repeats):
        for system, scheduler in schedulers.items():
            at_s = 0.0
            for mode in ("decodes alone", "prompt alone", "mixed"):
                if repeat and perf_counter() > until_s:
                    return
                count = 0 if mode == "prompt alone" else given.decodes
                wanted = requests(engine, given, count, {"decodes alone": None, "mixed": at_s}.get(mode, 0.0))
                served = engine.serve(wanted, scheduler)
                if bad := [record.error for record in served.records if record.error]:
                    raise HybridlabError(f"{system}, {mode}: a request failed: {bad[0]}")
                if mode == "decodes alone":  # in the mixed run, all decode by then
                    at_s = 1.2 * max(record.token_times_s[1] for record in served.records)
                row = {"system": system, "mode": mode, "repeat": repeat, "num_decodes": count, **latencies(served)}
                for record in served.records:
                    if record.request.id == LONG:  # a hand-off lies between the two
                        row["long_second_token_s"] = record.token_times_s[1] - record.token_times_s[0]
                yield row


def requests(
    engine: hl.Engine, given: argparse.Namespace, count: int, at_s: float | None, output: int | None = None
) -> list[hl.Request]:
    """`count` short requests at 0, and the long one at `at_s`, if given."""
    vocab, drawn = engine.spec.vocab, output or given.output
    found = [hl.Request(f"user {i}", tuple((i + j) % vocab for j in range(SHORT_PROMPT)), drawn) for i in range(count)]
    if at_s is not None:
        ids = tuple(i % min(997, vocab) for i in range(given.prompt))
        found.append(hl.Request(LONG, ids, LONG_OUTPUT, arrival_s=at_s))
    return found


def memory(engine: hl.Engine) -> dict[str, Any]:
    """Whether the weights that workers share are there once: their PSS summed over the workers, beside their size."""
    runtime = engine.runtime
    pids = runtime.pids if isinstance(runtime, Workers) else {}
    if isinstance(runtime, WorkerProcess):
        pids = {"worker": runtime.pid}
    at = [PACKED] if "experts (pinned)" in engine.memory.parts else [f" {engine.checkpoint.folder.resolve()}/"]
    found = {name: mapped_bytes(pid, *at)[0] for name, pid in pids.items() if pid is not None}
    pss = {name: fields["Pss"] / 1e9 for name, fields in found.items()}
    size = weights_bytes(engine) / 1e9
    shares = {f"{name}_weights_pss_gb": share for name, share in pss.items()}
    private_gb = sum(map(private, found.values())) / 1e9
    copies = sum(pss.values()) / size
    return {**shares, "weights_gb": size, "weights_private_gb": private_gb, "copies": copies}


def gpu_memory(engine: hl.Engine, given: argparse.Namespace, before_gb: float | None) -> dict[str, Any]:
    """What the workers have taken of their GPUs together, contexts included, beside the plan of it.

    `gpu_shared_gb` of that are there once for workers of one GPU, if one has "made" and the others "attached" them.
    """
    planned, runtime, now_gb = engine.memory.gpu, engine.runtime, gpu_used_gb(given.gpus)
    row: dict[str, Any] = {}
    if before_gb is not None and now_gb is not None:
        row["gpu_taken_gb"] = now_gb - before_gb
    if planned is not None:
        shared = sum(size for name, size in planned.parts.items() if name.endswith(", of all workers"))
        row |= {"gpu_planned_gb": planned.total_bytes / 1e9, "gpu_shared_gb": shared / 1e9}
    if isinstance(runtime, Workers):
        row["on_gpu"] = ", ".join(f"{name} {state}" for name, state in runtime.on_gpu.items())
    return row


def gpu_used_gb(gpus: Sequence[int]) -> float | None:
    """Of these GPUs by all processes, as nvidia-smi has it: asking torch would take a context on each."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(
            [*words, f"--id={','.join(map(str, sorted(set(gpus))))}"], capture_output=True, text=True, check=True
        )
        return sum(map(int, told.stdout.split())) * 2**20 / 1e9
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
