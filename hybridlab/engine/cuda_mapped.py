"""Physical memory of a GPU that several processes map, by the driver's virtual memory management.

The driver counts references: memory goes with the last descriptor, handle or mapping of it, not with the process that
made it. (What `cudaIpcGetMemHandle` opens goes with its owner.) All names below are those of CUDA's driver API.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from functools import cache
from typing import Any

import torch

_POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED, the only one
_READ, _READ_WRITE = 1, 3  # CU_MEM_ACCESS_FLAGS_PROT_...
_NEEDED = (102, 103)  # CU_DEVICE_ATTRIBUTE_: VIRTUAL_MEMORY_MANAGEMENT_, HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    )


class _AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class CudaMemory:
    """`whole` (uint8, flat, on the device) over physical memory that is exported by descriptor. See `create`, `attach`.

    Others are not kept from writing where the driver has no read-only mappings.
    """

    def __init__(self, descriptor: int, handle: ctypes.c_uint64, num_bytes: int, device: torch.device, *flags: int):
        """Takes `handle` over. `flags`: ways to map it, of which the first that the driver takes is used."""
        mapping = _Mapping(handle, num_bytes, _index(device), flags)
        self._descriptor = os.dup(descriptor)
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        self.whole = torch.as_tensor(mapping, device=device)

    @classmethod
    def create(cls, num_bytes: int, device: torch.device) -> CudaMemory:
        """New memory, to be written. Raises RuntimeError naming the call that the driver refused."""
        torch.empty(1, device=device)  # a context, and a current one
        wanted = _AllocationProp(_PINNED, _POSIX_FD, _Location(_ON_DEVICE, _index(device)))
        size = _whole_pages(num_bytes, wanted)
        handle, descriptor = ctypes.c_uint64(), ctypes.c_int()
        _call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(wanted), ctypes.c_uint64(0))
        try:
            _call("cuMemExportToShareableHandle", ctypes.byref(descriptor), handle, _POSIX_FD, ctypes.c_uint64(0))
        except RuntimeError:
            _call("cuMemRelease", handle)
            raise
        try:
            return cls(descriptor.value, handle, num_bytes, device, _READ_WRITE)
        finally:
            os.close(descriptor.value)

    @classmethod
    def attach(cls, descriptor: int, num_bytes: int, device: torch.device) -> CudaMemory:
        """Memory of `num_bytes` that another process made, to be read; `descriptor` stays the caller's."""
        torch.empty(1, device=device)
        handle = ctypes.c_uint64()
        _call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(descriptor), _POSIX_FD)
        return cls(descriptor, handle, num_bytes, device, _READ, _READ_WRITE)

    def export(self) -> int:
        return os.dup(self._descriptor)


class _Mapping:
    """An address for all of `handle`, which torch's tensors over it keep alive; unmapped with the last of them."""

    def __init__(self, handle: ctypes.c_uint64, num_bytes: int, device: int, flags: tuple[int, ...]) -> None:
        wanted = _AllocationProp(_PINNED, _POSIX_FD, _Location(_ON_DEVICE, device))
        address, size = ctypes.c_uint64(), ctypes.c_size_t(_whole_pages(num_bytes, wanted))
        none = ctypes.c_uint64(0)
        try:
            _call("cuMemAddressReserve", ctypes.byref(address), size, ctypes.c_size_t(0), none, none)
            try:
                _call("cuMemMap", address, size, ctypes.c_size_t(0), handle, none)
            except RuntimeError:
                _call("cuMemAddressFree", address, size)
                raise
        finally:
            _call("cuMemRelease", handle)  # the mapping holds it
        finalizer = weakref.finalize(self, _unmap, address, size)
        finalizer.atexit = False  # the process takes it along, and its context may be gone by then
        for last, flag in enumerate(flags, 1 - len(flags)):
            access = _AccessDesc(_Location(_ON_DEVICE, device), flag)
            try:
                _call("cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1))
                break
            except RuntimeError:
                if last == 0:
                    raise
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address.value, False), "version": 2,
        }  # fmt: skip


def can_share(index: int) -> bool:
    """Whether a GPU's memory can be exported by descriptor, by what its driver says; makes no context."""
    try:
        _call("cuInit", 0)
        device, answer = ctypes.c_int(), ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(device), index)
        for attribute in _NEEDED:
            _call("cuDeviceGetAttribute", ctypes.byref(answer), attribute, device)
            if not answer.value:
                return False
    except (OSError, AttributeError, RuntimeError):
        return False
    return True


def _whole_pages(num_bytes: int, wanted: _AllocationProp) -> int:
    step = ctypes.c_size_t()
    _call("cuMemGetAllocationGranularity", ctypes.byref(step), ctypes.byref(wanted), 0)  # 0: the least
    return -(-num_bytes // step.value) * step.value


def _unmap(address: ctypes.c_uint64, size: ctypes.c_size_t) -> None:
    for name in ("cuMemUnmap", "cuMemAddressFree"):
        getattr(_driver(), name)(address, size)  # a GPU that gave up gives nothing back


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    if (status := getattr(driver, name)(*arguments)) != 0:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(text))
        raise RuntimeError(f"{name}: {text.value.decode() if text.value else f'CUDA driver error {status}'}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
