"""One copy of what several workers only read of a GPU's memory: the first of them fills it, all map it.

The parent has its descriptor, so it stays whoever ends, and a worker that is started again finds it filled.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch

from hybridlab.checkpoint import Checkpoint
from hybridlab.engine.channel import Channel, ProtocolError
from hybridlab.engine.cuda_mapped import can_share
from hybridlab.engine.device_memory import DeviceMemory, attach_memory, create_memory
from hybridlab.engine.weight_index import WeightIndex, files_of
from hybridlab.errors import WeightsError
from hybridlab.model import build_model
from hybridlab.model.cuda_numerics import CudaBf16
from hybridlab.model.device_weights import DeviceWeights, Fill, ListedWeights, OwnWeights, full_name
from hybridlab.model.expert_block import ExpertBlock, experts_of

LAYOUT = "device"
MADE, ATTACHED, OWN = "made", "attached", "own"
"""What a worker has: memory that it made for all, memory that another one made, a copy of its own."""
Resident = Mapping[int, Sequence[int]]
"""Layer -> experts that live on the device."""


def device_index(checkpoint: Checkpoint, resident: Resident) -> WeightIndex:
    """All that `CudaBf16` and pools of `resident` experts ask for, as bytes by name and form."""
    listed = ListedWeights()
    model = build_model(checkpoint, CudaBf16("meta", listed), 1)
    for layer, experts in resident.items():
        block = ExpertBlock.of(experts_of(model.expert_weights(layer))[0])
        resident_pool(listed, layer, experts, block, lambda pool: None)
    return WeightIndex(LAYOUT, files_of(checkpoint), listed.sizes)


def resident_pool(
    weights: DeviceWeights, layer: int, experts: Sequence[int], block: ExpertBlock, fill: Fill
) -> torch.Tensor:
    """uint8 [experts, block bytes]."""
    name = f"experts {','.join(map(str, experts))} of layer {layer}"
    return weights.make(name, (len(experts), block.num_bytes), torch.uint8, fill)


class MappedDeviceWeights:
    """Views of memory in the layout of `index`; with `fills`, they are filled as they are asked for."""

    def __init__(self, whole: torch.Tensor, index: WeightIndex, *, fills: bool) -> None:
        self._whole, self._index, self._fills = whole, index, fills
        self._made: dict[str, torch.Tensor] = {}

    def make(self, name: str, shape: Sequence[int], dtype: torch.dtype, fill: Fill) -> torch.Tensor:
        if name not in self._made:
            first, _ = self._index.places[full_name(name, shape, dtype)]
            end = first + prod(shape) * dtype.itemsize
            tensor = self._made[name] = self._whole[first:end].view(dtype).view(*shape)
            if self._fills:
                fill(tensor)
        return self._made[name]


class SharedOnGpu:
    """A worker's side. `there_bytes` of `descriptor`, which it then owns, are filled already; 0 if nobody has.

    `pays`: this worker's share of the GPU counts them.
    """

    def __init__(self, descriptor: int | None, there_bytes: int, *, pays: bool) -> None:
        self._descriptor, self.there_bytes, self.pays = descriptor, there_bytes, pays
        self._memory: DeviceMemory | None = None
        self._index: WeightIndex | None = None
        self.state = OWN

    @property
    def num_bytes(self) -> int:
        """Of the memory that it has with others."""
        return 0 if self.state == OWN else self._index.num_bytes if self._index is not None else 0

    def weights(self, index: WeightIndex, device: torch.device) -> DeviceWeights:
        """Weights in the memory of all; of its own where that cannot be, which stderr says."""
        try:
            if self._descriptor is None:
                self._memory, self.state = create_memory(index.num_bytes, device), MADE
            else:
                memory = attach_memory(self._descriptor, self.there_bytes, device)
                head = memory.whole[: index.head_bytes].cpu().numpy()
                index.check(head.data, self.there_bytes)
                self._memory, self.state = memory, ATTACHED
        except (WeightsError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            print(
                f"hybridlab: GPU memory is not shared ({reason}); this worker has its own copy, which no plan counts",
                file=sys.stderr,
            )
            return OwnWeights(device)
        self._index = index
        return MappedDeviceWeights(self._memory.whole, index, fills=self.state == MADE)

    def filled(self) -> None:
        """All weights were asked for: wait until they are there, then say what they are in front of them."""
        if self.state != MADE:
            return
        assert self._memory is not None and self._index is not None
        head = torch.from_numpy(np.frombuffer(self._index.written(), np.uint8).copy())
        if self._memory.whole.is_cuda:
            torch.cuda.synchronize(self._memory.whole.device)
        self._memory.whole[: len(head)].copy_(head)

    def told(self) -> dict[str, Any]:
        """For the parent; a descriptor follows if this worker has made the memory."""
        return {"state": self.state, "num_bytes": self.num_bytes}

    def hand_over(self, channel: Channel) -> None:
        """Send the descriptor, if it is new, and keep none: what is mapped stays."""
        if self.state == MADE and self._memory is not None:
            descriptor = self._memory.export()
            channel.send_descriptor(descriptor)
            os.close(descriptor)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._memory = self._descriptor = None


class GpuCopy:
    """The parent's side, for the workers of one GPU, of which `payer` is the name of one. Close it in the end."""

    def __init__(self, payer: str) -> None:
        self.payer = payer
        self._making = threading.Lock()
        self._descriptor: int | None = None
        self._num_bytes, self._refused = 0, False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For the start of a worker, on a thread of its own: alone until one has made the memory, or could not.

        One that ends before that leaves its turn to the next.
        """
        with self._making:
            if self._descriptor is None and not self._refused:
                yield
                return
        yield

    def setup(self, name: str) -> dict[str, Any] | None:
        """What worker `name` is told, within its turn; None: it has its own copy."""
        if self._refused:
            return None
        return {"pays": name == self.payer, "there_bytes": self._num_bytes}

    def give(self, channel: Channel) -> None:
        """Behind the message with `setup`."""
        if self._descriptor is not None:
            channel.send_descriptor(self._descriptor)

    def take(self, told: Mapping[str, Any] | None, channel: Channel) -> str:
        """What a worker that is ready has `told`: its state. Raises `ProtocolError` for what it may not tell."""
        state = OWN if told is None else told["state"]
        is_new = self._descriptor is None
        if state not in (MADE, OWN) if is_new else state not in (ATTACHED, OWN):
            raise ProtocolError(f"memory of a GPU that is {state!r:.40}, expected {MADE if is_new else ATTACHED!r}")
        if state == MADE and told is not None:
            self._descriptor, self._num_bytes = channel.receive_descriptor(), int(told["num_bytes"])
        elif is_new:
            self._refused = True
        return state

    def close(self) -> None:
        """Idempotent."""
        descriptor, self._descriptor, self._refused = self._descriptor, None, True
        if descriptor is not None:
            os.close(descriptor)


def gpu_copies(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, GpuCopy]:
    """For each worker that shares its GPU (`gpu`) with others, if the driver can: what they have together."""
    found: dict[str, GpuCopy] = {}
    for gpu in {own["gpu"] for own in workers.values()}:
        names = [name for name, own in workers.items() if own["gpu"] == gpu]
        if len(names) > 1 and can_share(gpu):
            found |= dict.fromkeys(names, GpuCopy(names[0]))
    return found
