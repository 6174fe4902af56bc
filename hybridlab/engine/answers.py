"""What a worker process answers, read: arrays, and errors as they were raised there."""

from __future__ import annotations

from typing import Any

import numpy as np

from hybridlab import errors
from hybridlab.engine.channel import ProtocolError
from hybridlab.engine.worker import StepFailed
from hybridlab.errors import HybridlabError


def read_array(content: memoryview, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An answer that is an array; raises `ProtocolError` for one of another size."""
    if len(content) != np.dtype(dtype).itemsize * int(np.prod(shape)):
        raise ProtocolError(f"{len(content)} bytes, expected {dtype} {list(shape)}")
    return np.frombuffer(content, dtype).reshape(shape)


def read_error(plain: Any) -> Exception:
    """The error that a worker tells of: one of ours as it was, any other one as `StepFailed`."""
    if not isinstance(plain, dict) or not all(isinstance(plain.get(key), str) for key in ("class", "message")):
        raise ProtocolError("an error without class and message")
    cls = getattr(errors, plain["class"], None)
    if isinstance(cls, type) and issubclass(cls, HybridlabError):
        return cls(plain["message"])
    error = StepFailed(f"{plain['class']}: {plain['message']}")
    error.add_note(f"In the worker:\n{plain.get('traceback', '')}")
    return error
