"""Words in pinned memory by which a CUDA stream and a thread of the host tell each other that something is there."""

from __future__ import annotations

import ctypes
from functools import cache
from time import sleep
from typing import Protocol

import torch


class Words(Protocol):
    """`word` is an int32 tensor of one element in host memory."""

    def write(self, word: torch.Tensor) -> None:
        """The word becomes 1 once what was enqueued before on the current stream is done."""
        ...

    def wait(self, word: torch.Tensor) -> None:
        """What is enqueued after this on the current stream starts once the word is at least 1."""
        ...


class StreamWords:
    """Memory operations of the driver's streams, which CUDA graphs hold too; `word` is pinned.

    The quickest way that was tried for more than one token (docs/decisions/0014).
    """

    def write(self, word: torch.Tensor) -> None:
        self._call("cuStreamWriteValue32_v2", word)

    def wait(self, word: torch.Tensor) -> None:
        self._call("cuStreamWaitValue32_v2", word)  # flag 0: at least

    def _call(self, name: str, word: torch.Tensor) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(_driver(), name)(stream, ctypes.c_uint64(word.data_ptr()), ctypes.c_uint32(1), 0)
        if status != 0:
            # Not a user's mistake: often the first to meet an error of a kernel before it.
            raise RuntimeError(f"{name}: CUDA driver error {status}")


class PlainWords:
    """Without a GPU: the calling thread is the stream."""

    def write(self, word: torch.Tensor) -> None:
        word[0] = 1

    def wait(self, word: torch.Tensor) -> None:
        while not word[0]:
            sleep(0)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
