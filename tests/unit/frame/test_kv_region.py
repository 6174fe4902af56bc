"""Shared memory between two workers: what was left arrives once, bit for bit, and anything else is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hybridlab.batch import HandOff
from hybridlab.engine.channel import ProtocolError
from hybridlab.engine.hand_off_messages import pack_hand_off, unpack_hand_off
from hybridlab.engine.kv_cache import KVCache
from hybridlab.engine.kv_region import HandOffRefused, KVRegion, create_region, region_bytes, request_digest
from hybridlab.engine.offloaded_kv import OffloadedKV
from hybridlab.engine.pinned import Pins, pages
from hybridlab.strategies.checks import TOY_MODEL

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
WHERE = ("cpu", pytest.param("cuda", marks=[NO_GPU, pytest.mark.gpu]))
BLOCKS, SIZE = 6, 4
GIVEN = HandOff(7, "a", 10, 3, (5, 0, 2))
OWN, THERE = [1, 4, 3, 0], [2, 0, 5, 1]


@pytest.fixture
def descriptor() -> Iterator[int]:
    found = create_region(region_bytes(TOY_MODEL, BLOCKS, SIZE, 4))
    yield found
    os.close(found)


def cache(seed: int) -> KVCache:
    found = KVCache(TOY_MODEL, 8, SIZE, torch.float32)
    found.randomise(seed)
    return found


def region(descriptor: int) -> KVRegion:
    return KVRegion(descriptor, TOY_MODEL, BLOCKS, SIZE, torch.float32)


def rows(storage: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    return storage.view(-1, SIZE, *storage.shape[1:])[blocks]


def test_what_is_left_arrives_in_the_blocks_of_the_other_worker_and_nowhere_else(descriptor):
    source, target, before = cache(0), cache(1), cache(1)
    region(descriptor).leave(GIVEN, request_digest("a"), source, OWN)
    region(descriptor).take(GIVEN, request_digest("a"), target, THERE)
    others = [block for block in range(8) if block not in THERE[:3]]
    for layer in range(TOY_MODEL.num_layers):
        for one, two, three in zip(*(c.entries(layer) for c in (source, target, before)), strict=True):
            assert torch.equal(rows(one, OWN[:3]), rows(two, THERE[:3]))
            assert torch.equal(rows(two, others), rows(three, others))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("storage", [KVCache, OffloadedKV])
def test_it_goes_from_a_devices_cache_to_another_and_from_the_hosts(descriptor, storage, where, capsys):
    caches = [storage(TOY_MODEL, 8, SIZE, torch.float32, where) for _ in range(2)]
    for seed, one in enumerate(caches):
        one.randomise(seed)
    before = [storage.clone() for storage in caches[1].stored(0)]
    pin = where == "cuda"
    for move, one, own in (("leave", caches[0], OWN), ("take", caches[1], THERE)):
        mine = KVRegion(descriptor, TOY_MODEL, BLOCKS, SIZE, torch.float32, pin=pin)
        getattr(mine, move)(GIVEN, request_digest("a"), one, own)
        mine.close()
    others = [block for block in range(8) if block not in THERE[:3]]
    for layer in range(TOY_MODEL.num_layers):
        for one, two in zip(*(c.stored(layer) for c in caches), strict=True):
            assert torch.equal(rows(one, OWN[:3]), rows(two, THERE[:3]))
    for one, two in zip(before, caches[1].stored(0), strict=True):
        assert torch.equal(rows(one, others), rows(two, others))
    for one in caches:
        one.close()
    assert capsys.readouterr().err == ""


def test_a_region_that_the_driver_does_not_pin_is_used_as_it_is(descriptor, monkeypatch, capsys):
    def refuse(self, room, *, read_only=False):
        raise RuntimeError("cudaHostRegister: error 1")

    monkeypatch.setattr(Pins, "pin", refuse)
    mine = KVRegion(descriptor, TOY_MODEL, BLOCKS, SIZE, torch.float32, pin=True)
    assert "KV goes through memory that is not pinned (cudaHostRegister: error 1)" in capsys.readouterr().err
    mine.leave(GIVEN, request_digest("a"), cache(0), OWN)


@pytest.mark.parametrize(
    ("wanted", "request_id", "words"),
    [
        (replace(GIVEN, ticket=8), "a", "ticket is 7, expected 8"),
        (replace(GIVEN, step=4), "a", "step is 3, expected 4"),
        (replace(GIVEN, num_tokens=11), "a", "num_tokens is 10, expected 11"),
        (replace(GIVEN, blocks=(0, 5, 2)), "a", "index is 1, expected 0"),
        (replace(GIVEN, blocks=(5, 0, 1)), "a", "magic"),
        (GIVEN, "b", "request is"),
    ],
)
def test_anything_else_than_what_was_left_is_refused_and_changes_nothing(descriptor, wanted, request_id, words):
    target, before = cache(1), cache(1)
    region(descriptor).leave(GIVEN, request_digest("a"), cache(0), OWN)
    with pytest.raises(HandOffRefused, match=words):
        region(descriptor).take(wanted, request_digest(request_id), target, THERE)
    for one, two in zip(target.entries(0), before.entries(0), strict=True):
        assert torch.equal(one, two)
    region(descriptor).take(GIVEN, request_digest("a"), target, THERE)


def test_it_is_taken_once(descriptor):
    region(descriptor).leave(GIVEN, request_digest("a"), cache(0), OWN)
    region(descriptor).take(GIVEN, request_digest("a"), cache(1), THERE)
    with pytest.raises(HandOffRefused, match="state is 2, expected 1"):
        region(descriptor).take(GIVEN, request_digest("a"), cache(1), THERE)


def test_pieces_arrive_one_by_one_each_once(descriptor):
    source, target = cache(0), cache(1)
    region(descriptor).leave(GIVEN, request_digest("a"), source, OWN)
    last, first = replace(GIVEN, blocks=(0, 2), first=1), replace(GIVEN, blocks=(5,))
    with pytest.raises(HandOffRefused, match="index is 1, expected 0"):
        region(descriptor).take(replace(last, first=0), request_digest("a"), target, THERE[1:])
    for piece in (last, first):
        region(descriptor).take(piece, request_digest("a"), target, THERE[piece.first :])
        with pytest.raises(HandOffRefused, match="state is 2, expected 1"):
            region(descriptor).take(piece, request_digest("a"), target, THERE[piece.first :])
    for one, two in zip(source.entries(1), target.entries(1), strict=True):
        assert torch.equal(rows(one, OWN[:3]), rows(two, THERE[:3]))


def test_another_type_or_shape_is_refused(descriptor):
    region(descriptor).leave(GIVEN, request_digest("a"), cache(0), OWN)
    other = KVRegion(descriptor, TOY_MODEL, BLOCKS, SIZE, torch.int32)  # of the same size
    with pytest.raises(HandOffRefused, match="layout is"):
        other.take(GIVEN, request_digest("a"), cache(1), THERE)
    with pytest.raises(ValueError, match=r"a region of \d+ bytes, expected \d+"):
        KVRegion(descriptor, TOY_MODEL, BLOCKS, SIZE, torch.bfloat16)


@NO_GPU
@pytest.mark.gpu
def test_a_driver_that_refused_to_pin_goes_on_as_before():
    pins, room = Pins(), pages(2**20)
    pins.pin(room)
    with pytest.raises(RuntimeError, match="cudaHostRegister: error"):
        pins.pin(room)  # again
    assert torch.ones(4, device="cuda").add_(1).sum().item() == 8
    pins.close()


def test_nobody_can_change_its_size_and_it_has_no_name(descriptor):
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 1)
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    assert seals & fcntl.F_SEAL_SHRINK and seals & fcntl.F_SEAL_GROW
    assert os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:")


def test_a_hand_off_is_read_as_it_was_written():
    body = pack_hand_off(GIVEN, OWN)
    found, request, own = unpack_hand_off(memoryview(body), BLOCKS, 8, SIZE)
    assert (replace(found, id="a"), request, own) == (GIVEN, request_digest("a"), OWN)
    piece = replace(GIVEN, blocks=(0, 2), first=1)
    found, _, own = unpack_hand_off(memoryview(pack_hand_off(piece, OWN[1:])), BLOCKS, 8, SIZE)
    assert (replace(found, id="a"), own) == (piece, OWN[1:])
    for cut in (0, 8, len(body) - 1):
        with pytest.raises(ProtocolError, match="a hand-off of"):
            unpack_hand_off(memoryview(body[:cut]), BLOCKS, 8, SIZE)


@pytest.mark.parametrize(
    ("hand_off", "own", "words"),
    [
        (replace(GIVEN, blocks=(5, 0, 6)), OWN, "KV blocks 0 to 6 of 6"),
        (replace(GIVEN, blocks=(5, 5, 2)), OWN, "KV blocks 2 to 5 of 6"),
        (GIVEN, [1, 2, 8], "KV blocks 1 to 8 of 8"),
        (GIVEN, [-1, 2, 3], "KV blocks -1 to 3 of 8"),
        (GIVEN, [1, 2], "10 tokens in 3 blocks, the first one 0, from or to 2"),
        (replace(GIVEN, num_tokens=8), OWN, "8 tokens in 3 blocks"),
        (replace(GIVEN, first=1), OWN, "10 tokens in 3 blocks, the first one 1"),
        (HandOff(1, "a", 0, 0, ()), [], "0 tokens in 0 blocks"),
    ],
)
def test_a_hand_off_of_what_is_not_there_is_refused(hand_off, own, words):
    with pytest.raises(ProtocolError, match=words):
        unpack_hand_off(memoryview(pack_hand_off(hand_off, own)), BLOCKS, 8, SIZE)


def test_regions_grow_with_their_blocks():
    sizes = [region_bytes(TOY_MODEL, count, SIZE, 4) for count in (0, 1, 2, 1000)]
    assert all(one < two for one, two in pairwise(sizes))
