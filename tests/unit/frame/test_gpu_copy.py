"""What workers of one GPU only read there is there once: who fills it, what is compared before its use, who may end."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch

import hybridlab as hl
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import gpu_copy, remote_worker
from hybridlab.engine.channel import Channel, ChannelClosed, Kind, ProtocolError
from hybridlab.engine.cuda_device import cuda_device
from hybridlab.engine.cuda_memory import beside_others, gpu_needs
from hybridlab.engine.device_memory import NAME
from hybridlab.engine.gpu_copy import GpuCopy, MappedDeviceWeights, SharedOnGpu, gpu_copies
from hybridlab.engine.weight_index import WeightIndex
from hybridlab.errors import WorkerLost
from hybridlab.hardware.gpu import Gpu
from hybridlab.model.device_weights import ALIGNMENT
from hybridlab.plans import PlacementPlan, Tier

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_fp8_128"
CPU = torch.device("cpu")
INDEX = WeightIndex("device", {"config.json": (3, 7)}, {"a float32 [2, 3]": 512, "b uint8 [5]": 512})


def ask(weights, value: float = 1.0) -> list[torch.Tensor]:
    a = weights.make("a", (2, 3), torch.float32, lambda room: room.fill_(value))
    return [a, weights.make("b", (5,), torch.uint8, lambda room: room.fill_(int(value)))]


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    one, two = map(Channel, socket.socketpair())
    yield one, two
    one.close()
    two.close()


def made(channel: Channel) -> SharedOnGpu:
    """A worker that has made the memory, and sent its descriptor."""
    maker = SharedOnGpu(None, 0, pays=True)
    ask(maker.weights(INDEX, CPU), 3.0)
    maker.filled()
    assert maker.told() == {"state": "made", "num_bytes": INDEX.num_bytes}
    maker.hand_over(channel)
    return maker


def test_what_one_worker_fills_the_others_read(pair):
    made(pair[0])
    descriptor = pair[1].receive_descriptor()
    attached = SharedOnGpu(descriptor, INDEX.num_bytes, pays=False)
    found = ask(attached.weights(INDEX, CPU), 9.0)  # nothing is filled again
    attached.filled()
    assert [tensor.unique().tolist() for tensor in found] == [[3.0], [3]]
    assert [tensor.data_ptr() % 64 for tensor in found] == [0, 0]
    assert attached.told() == {"state": "attached", "num_bytes": INDEX.num_bytes}
    attached.hand_over(pair[0])  # nothing: it is the parent's already
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert [tensor.unique().tolist() for tensor in found] == [[3.0], [3]]


def test_who_attaches_cannot_write(pair):
    made(pair[0])
    attached = SharedOnGpu(pair[1].receive_descriptor(), INDEX.num_bytes, pays=False)
    tensor = ask(attached.weights(INDEX, CPU))[0]
    line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if within(line, tensor.data_ptr()))
    assert f"/memfd:{NAME}" in line and line.split()[1] == "r--s"


def within(line: str, address: int) -> bool:
    first, end = (int(number, 16) for number in line.split()[0].split("-"))
    return first <= address < end


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sizes": {**INDEX.sizes, "b uint8 [5]": 1024}}, r"b uint8 \[5\] has 512 bytes, expected 1024"),
        ({"files": {"config.json": (3, 8)}}, "file config.json of the checkpoint has changed"),
        ({"layout": "blocks"}, "they are in layout 'device', expected 'blocks'"),
    ],
)
def test_other_weights_are_not_used(pair, capfd, change, said):
    made(pair[0])
    other: Any = replace(INDEX, **change)
    attached = SharedOnGpu(pair[1].receive_descriptor(), INDEX.num_bytes, pays=False)
    found = ask(attached.weights(other, CPU), 9.0)
    assert [tensor.unique().tolist() for tensor in found] == [[9.0], [9]]
    assert attached.told() == {"state": "own", "num_bytes": 0}
    assert re.search(f"GPU memory is not shared .*{said}.*this worker has its own copy", capfd.readouterr().err)


def test_what_was_not_filled_to_the_end_is_not_used(pair, capfd):
    maker = SharedOnGpu(None, 0, pays=True)
    ask(maker.weights(INDEX, CPU))
    maker.hand_over(pair[0])  # without filled()
    attached = SharedOnGpu(pair[1].receive_descriptor(), INDEX.num_bytes, pays=False)
    ask(attached.weights(INDEX, CPU))
    assert attached.state == "own" and "they begin with" in capfd.readouterr().err


def test_where_nothing_can_be_shared_each_has_its_own(monkeypatch, capfd, pair):
    def refuse(num_bytes, device):
        raise RuntimeError("cuMemCreate: CUDA_ERROR_NOT_SUPPORTED")

    monkeypatch.setattr(gpu_copy, "create_memory", refuse)
    worker = SharedOnGpu(None, 0, pays=True)
    assert ask(worker.weights(INDEX, CPU), 2.0)[0].unique().tolist() == [2.0]
    assert "cuMemCreate: CUDA_ERROR_NOT_SUPPORTED" in capfd.readouterr().err
    copy = GpuCopy("a")
    assert copy.take(worker.told(), pair[0]) == "own"
    assert copy.setup("b") is None  # nobody tries again


def test_the_copy_is_the_parents(pair):
    copy = GpuCopy("prefill")
    assert copy.setup("decode") == {"pays": False, "there_bytes": 0}
    copy.give(pair[1])  # nothing yet
    maker = made(pair[0])
    assert copy.take(maker.told(), pair[1]) == "made"
    del maker
    for name in ("prefill", "decode", "prefill"):  # one that is started again attaches too
        assert copy.setup(name) == {"pays": name == "prefill", "there_bytes": INDEX.num_bytes}
        copy.give(pair[1])
        attached = SharedOnGpu(pair[0].receive_descriptor(), INDEX.num_bytes, pays=False)
        assert ask(attached.weights(INDEX, CPU))[0].unique().tolist() == [3.0]
        assert copy.take(attached.told(), pair[1]) == "attached"
    with pytest.raises(ProtocolError, match="'made', expected 'attached'"):
        copy.take({"state": "made", "num_bytes": 1}, pair[1])
    copy.close()
    copy.close()
    assert copy.setup("decode") is None


def test_others_wait_for_the_one_that_fills(pair):
    copy, order, begun = GpuCopy("a"), [], threading.Event()

    def start(name: str, fails: bool) -> None:
        with copy.turn():
            begun.set()
            order.append((name, copy.setup(name)))
            sleep(0.2)
            if fails:
                raise RuntimeError("killed")
            if copy.setup(name) == {"pays": name == "a", "there_bytes": 0}:
                copy.take(made(pair[0]).told(), pair[1])

    def quietly(name: str, fails: bool) -> None:
        try:
            start(name, fails)
        except RuntimeError:
            order.append((name, None))

    first = threading.Thread(target=quietly, args=("a", True))
    first.start()
    assert begun.wait(10)
    others = [threading.Thread(target=quietly, args=(name, False)) for name in ("b", "c")]
    for thread in others:
        thread.start()
    for thread in (first, *others):
        thread.join(30)
        assert not thread.is_alive()
    copy.close()
    assert order[:2] == [("a", {"pays": True, "there_bytes": 0}), ("a", None)]
    assert [told and told["there_bytes"] for _, told in order[2:]] == [0, INDEX.num_bytes]


def test_workers_of_one_gpu_are_those_that_share(monkeypatch):
    monkeypatch.setattr(gpu_copy, "can_share", lambda index: index != 2)
    gpus = {"prefill": 0, "decode": 0, "decode 2": 1, "prefill 2": 2, "decode 3": 2}
    found = gpu_copies({name: {"gpu": gpu} for name, gpu in gpus.items()})
    assert found.keys() == {"prefill", "decode"} and found["prefill"] is found["decode"]
    assert found["decode"].payer == "prefill"


def test_a_descriptor_that_is_none_is_refused(pair):
    pair[0].send(Kind.READY, b"")
    with pytest.raises(ProtocolError, match="0 descriptors, expected one"):
        pair[1].receive_descriptor()
    pair[0].close()
    with pytest.raises(ChannelClosed):
        while True:
            try:
                pair[1].receive_descriptor()
            except ProtocolError:
                continue


class Watched(SharedOnGpu):
    """Remembers what it was asked for."""

    def weights(self, index, device):
        self.index, self.given = index, super().weights(index, device)
        return self.given


@pytest.mark.parametrize("movable", [False, True])
@pytest.mark.parametrize("tier", [Tier.RESIDENT, Tier.STREAMED], ids=lambda tier: tier.value)
def test_all_that_a_device_asks_for_is_listed_and_planned(tier, movable):
    checkpoint = open_checkpoint(ORACLE)
    placed = PlacementPlan(tier, ring_slots=2, movable=movable)
    worker = Watched(None, 0, pays=True)
    device = cuda_device(checkpoint, placed, 2, where="cpu", on_gpu=worker)
    device.close()
    sizes = {name.split(" [")[0].rpartition(" ")[0]: size for name, size in worker.index.sizes.items()}
    assert worker.state == "made" and isinstance(worker.given, MappedDeviceWeights)
    assert set(worker.given._made) == set(sizes)
    assert any(name.startswith("experts ") for name in sizes) == (tier is Tier.RESIDENT and not movable)
    needs = gpu_needs(checkpoint.spec, placed, budget_bytes=2**34)
    pays, attached = (beside_others(needs, placed, pays=pays) for pays in (True, False))
    assert pays.free_bytes == needs.free_bytes
    saved = attached.free_bytes - pays.free_bytes
    assert -saved / 1000 < sum(sizes.values()) - saved < ALIGNMENT * len(sizes)  # plans round blocks up
    assert not [name for name in attached.parts(1, 1) if "of all workers" in name]
    assert sum(size for name, size in pays.parts(1, 1).items() if "of all workers" in name) == saved


def test_a_device_that_attaches_computes_the_same(pair):
    checkpoint = open_checkpoint(ORACLE)
    placed = PlacementPlan(Tier.RESIDENT)
    maker, alone = SharedOnGpu(None, 0, pays=True), cuda_device(checkpoint, placed, 2, where="cpu")
    first = cuda_device(checkpoint, placed, 2, where="cpu", on_gpu=maker)
    there_bytes = maker.num_bytes
    maker.hand_over(pair[0])
    first.close()
    del first, maker
    attached = SharedOnGpu(pair[1].receive_descriptor(), there_bytes, pays=False)
    second = cuda_device(checkpoint, placed, 2, where="cpu", on_gpu=attached)
    assert attached.state == "attached"
    x_TH = torch.randn(3, checkpoint.spec.hidden, generator=torch.Generator().manual_seed(1))
    for layer in checkpoint.spec.moe_layers:
        expected, found = (device.model.router(layer, x_TH) for device in (alone, second))
        assert torch.equal(expected.expert_ids, found.expert_ids) and torch.equal(expected.weights, found.weights)
    assert torch.equal(alone.model.head(x_TH), second.model.head(x_TH))
    alone.close()
    second.close()


def test_a_maker_that_is_killed_before_it_has_exported_ends_the_load(tmp_path, monkeypatch):
    script = Path(__file__).with_name("faulty_maker.py")
    monkeypatch.setattr(gpu_copy, "can_share", lambda index: True)
    gpus = (Gpu(0, "made up", 2**34, (9, 0)),)
    for module in ("engine.options", "loading", "hardware.detect"):
        monkeypatch.setattr(import_module(f"hybridlab.{module}"), "detect_gpus", lambda: gpus)
    options: dict[str, Any] = {"device": "cuda", "vram_gb": 8.0, "kv_tokens": 512, "token_budget": 64, "quiet": True}
    workers = {"prefill": {"threads": 1}, "decode": {"threads": 1}}
    for point in ("fills", "filled", "ready"):
        (folder := tmp_path / point).mkdir()
        monkeypatch.setattr(remote_worker, "COMMAND", (sys.executable, "-P", str(script), str(folder), point))
        with pytest.raises(WorkerLost, match="was ended by SIGKILL"):
            hl.load(ORACLE, workers=workers, **options)
        pids = [int(pid) for pid in (folder / "pids").read_text().split()]
        until_s = monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert monotonic() < until_s, "a worker is left"
            sleep(0.05)
        assert (folder / "failed").exists()
    with hl.load(ORACLE, workers=workers, **options) as engine:  # nobody fails now
        runtime: Any = engine.runtime
        assert sorted(runtime.on_gpu.values()) == ["attached", "made"]
