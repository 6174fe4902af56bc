"""Memory of a GPU by descriptor: what the driver refuses leaves nothing behind; on a GPU, it outlives who made it."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

from hybridlab.engine import cuda_mapped
from hybridlab.engine.channel import Channel
from hybridlab.engine.cuda_mapped import CudaMemory, _Mapping, can_share

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
PAGE = 2**21
TAKES = {"cuMemCreate": "handles", "cuMemImportFromShareableHandle": "handles", "cuMemAddressReserve": "addresses"}
GIVES = {"cuMemRelease": "handles", "cuMemAddressFree": "addresses", "cuMemUnmap": "mappings"}


class Driver:
    """Answers as the driver does, but maps nothing; calls named in `refused` fail, with `flags` of cuMemSetAccess."""

    def __init__(self, *refused: str, flags: tuple[int, ...] = (1, 3)) -> None:
        self.refused, self.flags = refused, flags
        self.held: Counter[str] = Counter()
        self.calls: list[str] = []
        self.file = os.open(os.devnull, os.O_RDONLY)

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            self.calls.append(name)
            if name == "cuGetErrorName":
                given[1]._obj.value = b"CUDA_ERROR_NOT_SUPPORTED"
                return 0
            if name in self.refused or (name == "cuMemSetAccess" and given[2]._obj.flags not in self.flags):
                return 801
            if name in TAKES or name == "cuMemMap":
                self.held[TAKES.get(name, "mappings")] += 1
            self.held[GIVES.get(name, "")] -= name in GIVES
            if name == "cuMemGetAllocationGranularity":
                assert ctypes.sizeof(given[1]._obj) == 32 and given[1]._obj.handle_types == 1
                given[0]._obj.value = PAGE
            elif name == "cuMemAddressReserve":
                assert given[1].value == 2 * PAGE
                given[0]._obj.value = 7 * PAGE
            elif name == "cuMemExportToShareableHandle":
                given[0]._obj.value = os.dup(self.file)
            elif name == "cuDeviceGetAttribute":
                given[0]._obj.value = int(f"attribute {given[1]}" not in self.refused)
            return 0

        return call


@pytest.fixture
def plant(monkeypatch):
    def put(driver: Driver) -> Driver:
        monkeypatch.setattr(cuda_mapped, "_driver", lambda: driver)
        monkeypatch.setattr(cuda_mapped, "_index", lambda device: 0)
        return driver

    return put


@pytest.mark.parametrize(
    "name",
    [
        *("cuMemGetAllocationGranularity", "cuMemCreate", "cuMemExportToShareableHandle", "cuMemAddressReserve"),
        *("cuMemMap", "cuMemSetAccess"),
    ],
)
def test_a_refused_call_is_named_and_leaves_nothing(plant, name):
    driver, before = plant(Driver(name)), len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match=f"{name}: CUDA_ERROR_NOT_SUPPORTED"):
        CudaMemory.create(PAGE + 1, torch.device("cpu"))
    gc.collect()
    assert not +driver.held and not -driver.held
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_mapping_lasts_as_long_as_who_holds_it(plant):
    driver = plant(Driver(flags=(3,)))  # no read-only mappings
    driver.held["handles"] += 1
    mapping = _Mapping(ctypes.c_uint64(5), PAGE + 1, 0, (1, 3))
    assert mapping.__cuda_array_interface__["data"] == (7 * PAGE, False)
    assert mapping.__cuda_array_interface__["shape"] == (PAGE + 1,)
    assert +driver.held == {"addresses": 1, "mappings": 1} and driver.calls.count("cuMemSetAccess") == 2
    del mapping
    gc.collect()
    assert not +driver.held


def test_only_a_driver_that_exports_descriptors_is_asked_to(plant):
    plant(Driver())
    assert can_share(0)
    for refused in ("cuInit", "cuDeviceGet", "attribute 102", "attribute 103"):
        plant(Driver(refused))
        assert not can_share(0)


@NO_GPU
@pytest.mark.gpu
def test_memory_of_a_gpu_outlives_who_made_it():
    assert can_share(0)
    device, size = torch.device("cuda:0"), 3 * 2**21 + 5
    ours, theirs = socket.socketpair()
    program = (
        "import socket, sys, time, torch\n"
        "from hybridlab.engine.channel import Channel\n"
        "from hybridlab.engine.cuda_mapped import CudaMemory\n"
        f"memory = CudaMemory.create({size}, torch.device('cuda:0'))\n"
        "memory.whole.copy_(torch.arange(len(memory.whole)) % 251)\n"
        "torch.cuda.synchronize()\n"
        "Channel(socket.socket(fileno=int(sys.argv[1]))).send_descriptor(memory.export())\n"
        "time.sleep(600)\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", program, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        descriptor = Channel(ours).receive_descriptor()
        before = CudaMemory.attach(descriptor, size, device)
        maker.send_signal(signal.SIGKILL)
        maker.wait()
        after = CudaMemory.attach(descriptor, size, device)
    finally:
        maker.kill()
        maker.wait()
        ours.close()
    os.close(descriptor)
    expected = (torch.arange(size) % 251).to(torch.uint8)
    for memory in (before, after):
        assert memory.whole.is_cuda and torch.equal(memory.whole.cpu(), expected)
    third = after.whole[7:]
    del after, memory, before
    assert torch.equal(third.cpu(), expected[7:])  # a view keeps the mapping


@NO_GPU
@pytest.mark.gpu
def test_memory_of_a_gpu_is_given_back():
    device = torch.device("cuda:0")
    torch.empty(1, device=device)
    free, _ = torch.cuda.mem_get_info(device)
    memory = CudaMemory.create(2**30, device)
    view = memory.whole[2**20 :].view(torch.bfloat16).view(-1, 64)
    view.fill_(1.5)
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info(device)[0] >= 2**30
    del memory, view
    assert free - torch.cuda.mem_get_info(device)[0] < 2**27


@NO_GPU
@pytest.mark.gpu
def test_what_is_no_memory_of_a_gpu_is_refused():
    with (
        open(os.devnull, "rb") as file,
        pytest.raises(RuntimeError, match="cuMemImportFromShareableHandle: CUDA_ERROR"),
    ):
        CudaMemory.attach(file.fileno(), 2**21, torch.device("cuda:0"))
