"""Shared weights: filled once, sealed, checked by who attaches, and gone with the last process that holds them."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hybridlab as hl
from hybridlab.checkpoint import open_checkpoint
from hybridlab.engine import weight_index
from hybridlab.engine.shared_tiles import SharedTiles, tiles_index
from hybridlab.engine.shared_weights import SharedWeights, huge_pages
from hybridlab.engine.weight_index import WeightIndex
from hybridlab.errors import WeightsError
from hybridlab.model.weight_layout import Tiles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux'")
INDEX = WeightIndex("tiles", {"a.safetensors": (10, 20)}, {"x": 100, "y": 64, "z": 1})


def write(name: str, room: np.ndarray) -> None:
    room[:] = ord(name)


@pytest.fixture
def shared():
    with SharedWeights.create(INDEX) as made:
        yield made


@pytest.fixture
def tiny(tmp_path) -> Path:
    return hl.make_checkpoint(tmp_path / "tiny", "tiny", dtype="fp8", seed=1).folder


def test_what_was_written_is_read_by_every_owner_of_the_memory(shared):
    assert shared.seal == ""
    first = shared.open(INDEX, write, threads=2)
    assert shared.seal in ("write", "future write")
    with shared.duplicate() as other:
        second = other.attach(INDEX)
    for mapped in (first, second):
        assert {name: (array[0], array[-1], len(array)) for name, array in mapped.weights.items()} == {
            name: (ord(name), ord(name), size) for name, size in INDEX.sizes.items()
        }
        assert all(array.ctypes.data % weight_index.ALIGNMENT == 0 for array in mapped.weights.values())
        assert mapped.populate() in (True, False)
    assert first.whole.ctypes.data != second.whole.ctypes.data


def test_nothing_is_filled_twice(shared):
    names = []
    shared.open(INDEX, lambda name, room: names.append(name), threads=1)
    shared.open(INDEX, lambda name, room: names.append(name), threads=1)
    assert names == list(INDEX.sizes)


def test_sealed_weights_cannot_be_written_resized_or_unsealed(shared):
    mapped = shared.open(INDEX, write, threads=1)
    with pytest.raises(ValueError, match="read-only"):
        mapped.weights["x"][0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        mapped.weights["x"].flags.writeable = True
    for attempt in (
        lambda: os.pwrite(shared.fileno(), b"1", 0),
        lambda: os.ftruncate(shared.fileno(), 0),
        lambda: os.ftruncate(shared.fileno(), 2 * INDEX.num_bytes),
        lambda: mmap.mmap(shared.fileno(), INDEX.num_bytes),
        lambda: fcntl.fcntl(shared.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK),
    ):
        with pytest.raises(PermissionError):
            attempt()


def test_weights_that_nobody_has_filled_are_refused(shared):
    with pytest.raises(WeightsError, match="nobody has filled and sealed them"):
        shared.attach(INDEX)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (replace(INDEX, layout="blocks"), "in layout 'tiles', expected 'blocks'"),
        (replace(INDEX, files={"a.safetensors": (10, 21)}), r"file a\.safetensors of the checkpoint has changed since"),
        (replace(INDEX, files={"a.safetensors": (11, 20)}), r"file a\.safetensors of the checkpoint has changed since"),
        (replace(INDEX, files={}), r"file a\.safetensors .* now no such file"),
        (replace(INDEX, sizes={**INDEX.sizes, "y": 65}), "y has 64 bytes, expected 65"),
        (replace(INDEX, sizes={"x": 100, "y": 64}), "z has 1 bytes, expected None"),
        (replace(INDEX, sizes={**INDEX.sizes, "w": 5}), "w has None bytes, expected 5"),
        (replace(INDEX, sizes={"y": 64, "x": 100, "z": 1}), "in another order"),
    ],
)
def test_weights_of_another_checkpoint_are_refused_by_name(shared, expected, message):
    shared.open(INDEX, write, threads=1)
    with pytest.raises(WeightsError, match=message):
        shared.attach(expected)


@pytest.mark.parametrize(
    ("at", "written", "message"),
    [
        (0, b"other", "begin with"),
        (8, b"\7", "their index has format 7, expected 1"),
        (60, b"\0", "checksum differs"),
        (12, b"\0\0\0\0", "checksum differs"),
        (12, b"\xff\xff\xff\xff", "checksum differs"),
    ],
)
def test_a_damaged_index_is_one_clear_error(at, written, message):
    head = bytearray(INDEX.written())
    head[at : at + len(written)] = written
    memory = bytes(head).ljust(INDEX.num_bytes, b"\0")
    with pytest.raises(WeightsError, match=message):
        INDEX.check(memoryview(memory))


def test_an_index_that_is_no_index_is_refused(monkeypatch):
    monkeypatch.setattr(WeightIndex, "_text", b'{"layout": "tiles", "files": [], "sizes": 3}')
    memory = replace(INDEX).written().ljust(4096, b"\0")
    monkeypatch.undo()
    with pytest.raises(WeightsError, match="it is no index"):
        INDEX.check(memoryview(memory))
    with pytest.raises(WeightsError, match="3 bytes hold no index"):
        INDEX.check(memoryview(b"abc"))


def test_what_fails_over_filling_leaves_it_to_the_next(shared):
    def fail(name, room):
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError):
        shared.open(INDEX, fail, threads=2)
    assert shared.seal == ""
    assert shared.open(INDEX, write, threads=2).weights["z"][0] == ord("z")


def test_a_process_that_is_killed_over_filling_leaves_it_to_the_next(shared):
    script = """if True:
        import os, signal, sys
        from hybridlab.engine.shared_weights import SharedWeights
        from hybridlab.engine.weight_index import WeightIndex
        index = WeightIndex("tiles", {"a.safetensors": (10, 20)}, {"x": 100, "y": 64, "z": 1})
        def write(name, room):
            if name == "y":
                os.kill(os.getpid(), signal.SIGKILL)
            room[:] = 7
        SharedWeights(int(sys.argv[1])).open(index, write, threads=1)
    """
    ended = subprocess.run(
        [sys.executable, "-c", script, str(shared.fileno())], pass_fds=(shared.fileno(),), check=False
    )
    assert ended.returncode == -9 and shared.seal == ""
    assert shared.open(INDEX, write, threads=1).weights["x"][0] == ord("x")


def test_packed_weights_are_those_that_a_process_packs_for_itself(tiny):
    checkpoint = open_checkpoint(tiny)
    index = tiles_index(checkpoint)
    with SharedWeights.create(index) as shared:
        first, second = (SharedTiles(checkpoint, shared, 2) for _ in range(2))
        first.open()
        second.open()
        assert (first.num_packed, second.num_packed) == (len(index.sizes), 0)
        private = Tiles(2)
        for name in index.sizes:
            weights = checkpoint.linear(name)
            (mine, scale), (theirs, _) = second(weights), private(weights)
            assert np.array_equal(mine.data, theirs.data) and scale is weights.scale
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


def test_weights_of_a_checkpoint_that_was_written_anew_are_refused(tiny):
    with SharedWeights.create(tiles_index(open_checkpoint(tiny))) as shared:
        SharedTiles(open_checkpoint(tiny), shared, 1).open()
        shutil.rmtree(tiny)
        again = open_checkpoint(hl.make_checkpoint(tiny, "tiny", dtype="fp8", seed=2).folder)
        with pytest.raises(WeightsError, match=r"file \S+ of the checkpoint has changed since"):
            SharedTiles(again, shared, 1).open()


def test_room_of_another_size_is_not_filled(shared):
    with pytest.raises(WeightsError, match="room for"):
        shared.open(replace(INDEX, sizes={"x": 2**23}), write, threads=1)


def test_huge_pages_are_what_the_system_says():
    assert huge_pages() in ("", "always", "within_size", "advise", "never", "deny", "force")
