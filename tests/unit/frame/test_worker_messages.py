"""What goes between a process and its worker: it comes back as it was, and what cannot be is refused before its use."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlab.batch import Entry
from hybridlab.engine.channel import Channel, ChannelClosed, Kind, ProtocolError, pack_json, unpack_json
from hybridlab.engine.child import COMMAND, Child
from hybridlab.engine.program_messages import (
    pack_moves,
    pack_program,
    placement,
    plain_placement,
    unpack_moves,
    unpack_program,
)
from hybridlab.engine.step_messages import (
    Spans,
    Step,
    pack_choice,
    pack_result,
    pack_step,
    unpack_choice,
    unpack_result,
    unpack_step,
)
from hybridlab.lowering import Planner
from hybridlab.plans import Move, PlacementPlan, Program, SlotUse, Span, StepPlan, Tier
from hybridlab.request import Sampling
from hybridlab.strategies.checks import TOY_GPU, TOY_MODEL
from hybridlab.strategies.overlap.dual_batch import DualBatch
from hybridlab.strategies.placement.streamed import Streamed

BLOCKS, BLOCK = 8, 4
ENTRIES = (
    Entry("a", (1, 2, 3), 0, (0, 1), Sampling(0.5, 0.9, -3), False),
    Entry("b", [7], 5, (5, 2), Sampling(), True),
    Entry("c", [9], 0, (3,), Sampling(1.0, 1.0, 2**70), True),
)
PLACED = PlacementPlan(
    Tier.STREAMED, {(TOY_MODEL.moe_layers[0], 1): Tier.RESIDENT}, {}, ring_slots=3, parts_per_layer=2
)


def program() -> Program:
    planner = Planner(TOY_MODEL, TOY_GPU, Streamed(stream_from_tokens=1), DualBatch(min_requests=1), PLACED)
    return planner.program(planner.shape("main", StepPlan("decode", {"a": 1, "b": 1, "c": 1})))


PROGRAM = program()


def unpack(body: bytes, programs=None) -> Step:
    return unpack_step(memoryview(body), programs or {5: PROGRAM}, TOY_MODEL, BLOCKS, BLOCK)


def test_a_program_comes_back_as_it_was():
    number, found = unpack_program(memoryview(pack_program(5, PROGRAM)), TOY_MODEL)
    assert (number, found.shape, found.ops, found.order) == (5, PROGRAM.shape, PROGRAM.ops, PROGRAM.order)
    assert any(op.slot for op in found.ops) and found.shape.num_microbatches == 2
    some = replace(PROGRAM.shape.path, prefetch=(frozenset({0, 2}),) * TOY_MODEL.num_layers, min_tokens=3)
    chosen = Program(replace(PROGRAM.shape, path=some), PROGRAM.ops, PROGRAM.order)
    assert unpack_program(memoryview(pack_program(6, chosen)), TOY_MODEL)[1].shape == chosen.shape


def with_ops(*ops) -> Program:
    return Program(PROGRAM.shape, ops, ops)


LOADS = tuple(replace(op, needs=()) for op in PROGRAM.ops if op.kind == "load")


def test_parts_of_a_program_are_programs():
    """Benchmarks time loads alone, which no step would do: slots are filled again before anybody reads them."""
    assert unpack_program(memoryview(pack_program(5, with_ops(*LOADS))), TOY_MODEL)[1].ops == LOADS


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (with_ops(LOADS[0], LOADS[0]), "is there twice"),
        (with_ops(replace(LOADS[0], needs=(LOADS[1].id,)), LOADS[1]), "before what it needs"),
        (with_ops(replace(LOADS[0], slot=SlotUse(3, 0))), "of slot 3"),
        (with_ops(replace(LOADS[0], microbatch=2)), "of microbatch 2"),
        (with_ops(replace(LOADS[0], layer=TOY_MODEL.num_layers + 1)), "of layer"),
        (with_ops(replace(LOADS[0], experts=(TOY_MODEL.num_experts,))), "experts .* of"),
        (Program(PROGRAM.shape, LOADS[:2], LOADS[1::-1]), "in another order"),
    ],
)
def test_a_program_that_cannot_run_is_refused(bad, words):
    with pytest.raises(ProtocolError, match=words):
        unpack_program(memoryview(pack_program(5, bad)), TOY_MODEL)


def test_placements_and_moves_come_back_as_they_were():
    assert placement(unpack_json(memoryview(pack_json(plain_placement(PLACED))))) == PLACED
    moves = (Move(TOY_MODEL.moe_layers[0], 1, Tier.HOST), Move(TOY_MODEL.moe_layers[-1], 0, Tier.RESIDENT))
    assert unpack_moves(memoryview(pack_moves(moves)), TOY_MODEL) == moves
    for bad in (Move(99, 0, Tier.HOST), Move(TOY_MODEL.moe_layers[0], TOY_MODEL.num_experts, Tier.HOST)):
        with pytest.raises(ProtocolError, match="a move of expert"):
            unpack_moves(memoryview(pack_moves([bad])), TOY_MODEL)


def test_a_step_and_its_result_come_back_as_they_were():
    step = unpack(pack_step(5, ENTRIES, 12.5, True))
    assert (step.number, step.program, step.clock_start_s, step.asks) == (5, PROGRAM, 12.5, True)
    for index, (found, sent) in enumerate(zip(step.batch.entries, ENTRIES, strict=True)):
        seed = sent.sampling.seed % 2**64  # all that a draw depends on
        assert found == replace(
            sent, id=str(index), token_ids=list(sent.token_ids), sampling=replace(sent.sampling, seed=seed)
        )
    spans = [Span(op, 0.5 * i, 0.5 * i + 0.25) for i, op in enumerate(reversed(PROGRAM.ops))]
    place = {op.id: i for i, op in enumerate(PROGRAM.ops)}
    body = memoryview(pack_result(step, {"1": 4, "2": 0}, spans, place))
    tokens, found = unpack_result(body, ENTRIES, PROGRAM)
    assert tokens == {"b": 4, "c": 0} and list(found) == spans
    assert isinstance(found, Spans) and (len(found), found[0], found[-1]) == (len(spans), spans[0], spans[-1])
    assert list(found[2:4]) == spans[2:4]
    with pytest.raises(IndexError):
        found[len(spans)]


def test_a_choice_comes_back_for_its_entries():
    own = tuple(replace(entry, id=str(i)) for i, entry in enumerate(ENTRIES))
    ids = np.arange(8, dtype=np.int32).reshape(4, 2)
    layer, entries, found = unpack_choice(memoryview(pack_choice(1, own[:2], ids)), ENTRIES)
    assert (layer, entries) == (1, ENTRIES[:2]) and np.array_equal(found, ids)
    with pytest.raises(ProtocolError, match="a choice of"):
        unpack_choice(memoryview(pack_choice(1, own[1:], ids)), ENTRIES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": [TOY_MODEL.vocab]}, f"tokens .* of {TOY_MODEL.vocab}"),
        ({"token_ids": [-1]}, "tokens -1"),
        ({"block_table": (0, BLOCKS)}, f"KV blocks 0 to {BLOCKS} of {BLOCKS}"),
        ({"block_table": (0, -1)}, "KV blocks -1"),
        ({"start": 8}, "beyond the end of its KV blocks"),
        ({"start": -1}, "beyond the end of its KV blocks"),
        ({"block_table": ()}, "beyond the end of its KV blocks"),
        ({"token_ids": []}, "2 microbatches"),
    ],
)
def test_a_step_that_names_what_is_not_there_is_refused(change, words):
    entries = (ENTRIES[0], replace(ENTRIES[1], **change), ENTRIES[2])
    with pytest.raises(ProtocolError, match=words):
        unpack(pack_step(5, entries, 0.0, False))


def test_steps_of_unknown_programs_and_of_too_few_requests_are_refused():
    with pytest.raises(ProtocolError, match="program 6, which was never sent"):
        unpack(pack_step(6, ENTRIES, 0.0, False))
    with pytest.raises(ProtocolError, match="1 requests of a step with 2 microbatches"):
        unpack(pack_step(5, ENTRIES[:1], 0.0, False))


def test_a_result_of_another_step_is_refused():
    step = unpack(pack_step(5, ENTRIES, 0.0, False))
    body = memoryview(pack_result(step, {"1": 4, "2": 0}, [Span(PROGRAM.ops[-1], 0, 1)], {PROGRAM.ops[-1].id: 10**6}))
    with pytest.raises(ProtocolError, match="a span of op 1000000"):
        unpack_result(body, ENTRIES, PROGRAM)
    with pytest.raises(ProtocolError, match="for 3 requests"):
        unpack_result(body, ENTRIES[:2], PROGRAM)
    with pytest.raises(ProtocolError, match="a token that was to be drawn is missing"):
        unpack_result(memoryview(pack_result(step, {"1": 4}, [], {})), ENTRIES, PROGRAM)


PROGRAM_BYTES, STEP_BYTES = pack_program(5, PROGRAM), pack_step(5, ENTRIES, 0.0, False)


@given(st.data())
def test_bytes_that_were_changed_are_refused_or_read_never_worse(data):
    for body, read in ((STEP_BYTES, unpack), (PROGRAM_BYTES, lambda b: unpack_program(memoryview(b), TOY_MODEL))):
        changed = bytearray(body)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.sampled_from([len(body), len(body) - 1, 3, 0]))
        try:
            read(bytes(changed[:cut]))
        except ProtocolError:
            pass
        else:
            assert cut == len(body)


def pair() -> tuple[Channel, socket.socket]:
    one, other = socket.socketpair()
    return Channel(one), other


@pytest.mark.parametrize(
    "header", [b"hlw2" + struct.pack("<IQ", 3, 0), b"hlw1" + struct.pack("<IQ", 99, 0), b"hlw1" + b"\xff" * 12]
)
def test_a_header_that_is_none_is_refused(header):
    channel, other = pair()
    with other:
        other.sendall(header)
        with pytest.raises(ProtocolError, match="a header of"):
            channel.receive()
    channel.close()


def test_messages_pass_whole_and_an_end_is_told():
    channel, other = pair()
    sender = Channel(other)
    sender.send(Kind.STEP, b"ab", np.arange(3, dtype="<i4").data)
    kind, body = channel.receive()
    assert kind is Kind.STEP and bytes(body) == b"ab" + np.arange(3, dtype="<i4").tobytes()
    other.sendall(b"hlw1\x03")  # and no more
    sender.close()
    with pytest.raises(ChannelClosed, match="closed the connection"):
        channel.receive()
    with pytest.raises(ChannelClosed):
        channel.send(Kind.STEP, b"x" * 100)
    channel.close()


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        (Kind.STEP, b"", "STEP before SETUP"),
        (Kind.SETUP, b"{", "no JSON"),
        (Kind.SETUP, b'{"package": "/elsewhere"}', "a setup of"),
    ],
)
def test_a_worker_refuses_what_is_no_setup_and_ends(kind, body, words):
    child = Child(COMMAND)
    child.channel.send(kind, body)
    answer, told = child.channel.receive()
    assert answer is Kind.LOST and words in unpack_json(told)["message"]
    with pytest.raises(ChannelClosed):
        child.channel.receive()
    assert child.how_it_ended() == f"worker process {child.pid} ended with status 1"
    child.close()


def test_a_worker_whose_parent_has_ended_meanwhile_ends_too():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [*COMMAND, str(theirs.fileno()), str(os.getppid())]  # as if it had been handed on
        assert subprocess.run(command, pass_fds=(theirs.fileno(),), timeout=60).returncode == 1
