"""Telling a step that failed from a device that can compute no more."""

from __future__ import annotations

import torch

from hybridlab.errors import WorkerLost


def require_usable(where: str) -> None:
    """To be called after an error: raises `WorkerLost` if nothing can be computed on `where` any more.

    Some CUDA errors (an illegal address, a failed assertion in a kernel) stay until the process ends, and come up at
    the next call that waits for the device, whatever it is.
    """
    device = torch.device(where)
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return  # of a device that still answers
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise WorkerLost(f"{where} can compute no more in this process: {lines[0]}") from error
