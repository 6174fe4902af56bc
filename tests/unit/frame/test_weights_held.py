"""The process that keeps weights: who it answers to, what it gives, and when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from hybridlab import weights_held, weights_holder
from hybridlab.engine.shared_weights import NAME
from hybridlab.errors import ConfigError, WeightsError
from hybridlab.weights_held import Held, parse_idle
from hybridlab.weights_holder import MAGIC, REPLY, REQUEST, Verb

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets and memfd are Linux'")
PATIENCE_S = 60.0


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create(NAME)
    os.pwrite(descriptor, b"weights", 0)
    yield descriptor
    os.close(descriptor)


def begin(folder: Path, memory: int, idle_s: float = 600.0) -> Held:
    with weights_held.claim(folder, "tiles") as server:
        return weights_held.start(server, memory, folder, "tiles", 7, idle_s)


@pytest.fixture
def held(tmp_path, memory) -> Iterator[Held]:
    yield begin(tmp_path, memory)
    weights_held.release(tmp_path)


def connection(held: Held) -> socket.socket:
    made = weights_held._connect(weights_held._name(held.folder, held.layout))
    assert made is not None
    return made


def wait_until(done) -> None:
    patience = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < patience
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    """Ended, be it that its parent has yet to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_holder_says_what_it_holds(tmp_path, held):
    assert (held.folder, held.layout, held.num_bytes, held.attached) == (str(tmp_path), "tiles", 7, 0)
    assert held.idle_s == 600.0 and held.idle_left_s is not None and 0 < held.idle_left_s <= 600
    assert [other.pid for other in weights_held.list_held() if other.folder == held.folder] == [held.pid]
    assert weights_held.find(tmp_path, "blocks") is None
    assert weights_held.find(tmp_path / "other", "tiles") is None


def test_the_memory_is_given_and_outlives_its_holder(tmp_path, held, memory):
    found = weights_held.attach(tmp_path, "tiles")
    assert found is not None
    descriptor, lease, about = found
    try:
        assert (about.attached, about.idle_left_s) == (1, None)
        assert os.fstat(descriptor).st_ino == os.fstat(memory).st_ino and not os.get_inheritable(descriptor)
        os.kill(held.pid, signal.SIGKILL)
        wait_until(lambda: has_ended(held.pid))
        assert weights_held.find(tmp_path, "tiles") is None
        assert os.pread(descriptor, 9, 0) == b"weights"
        assert weights_held.attach(tmp_path, "tiles") is None
    finally:
        os.close(descriptor)
        lease.close()


def test_a_holder_ends_by_itself_once_nobody_has_used_it_for_so_long(tmp_path, memory):
    held = begin(tmp_path, memory, idle_s=1.0)
    found = weights_held.attach(tmp_path, "tiles")
    assert found is not None
    descriptor, lease, _ = found
    os.close(descriptor)
    time.sleep(1.5)  # longer than it may be idle: but it is used
    assert not has_ended(held.pid)
    lease.close()
    wait_until(lambda: has_ended(held.pid))
    assert weights_held.find(tmp_path, "tiles") is None


def test_a_connection_without_a_lease_keeps_nothing(tmp_path, memory):
    held = begin(tmp_path, memory, idle_s=0.5)
    with connection(held):
        wait_until(lambda: has_ended(held.pid))


def test_released_weights_are_gone_and_released_once(tmp_path, held):
    assert [ended.pid for ended in weights_held.release(tmp_path)] == [held.pid]
    wait_until(lambda: has_ended(held.pid))
    assert weights_held.release(tmp_path) == []


def test_weights_are_held_once(tmp_path, held):
    with pytest.raises(WeightsError, match="are held, or being filled, already"), weights_held.claim(tmp_path, "tiles"):
        pass


def test_a_claim_that_came_to_nothing_leaves_the_name_free(tmp_path):
    for _ in range(2):
        with weights_held.claim(tmp_path, "tiles"):
            assert weights_held.find(tmp_path, "tiles") is None


def test_a_holder_that_cannot_start_is_one_clear_error(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(weights_held, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(WeightsError, match="ended with status 3"):
        begin(tmp_path, memory)


@pytest.mark.parametrize(
    "packet",
    [b"", b"x", REQUEST.pack(b"hlh0", 1), REQUEST.pack(MAGIC, 9), REQUEST.pack(MAGIC, 1) + b"more", bytes(4096)],
)
def test_a_client_that_sends_what_it_may_not_is_cut_off_and_no_other(held, packet):
    with connection(held) as bad, connection(held) as good:
        bad.send(packet)
        assert bad.recv(100) == b""
        assert weights_held._ask(good, Verb.INFO).pid == held.pid


def test_a_client_of_another_user_is_cut_off(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(weights_holder, "user_of", lambda peer: os.geteuid() + 1)
    with weights_held.claim(tmp_path, "tiles") as server:
        holder = weights_holder.Holder(memory, server, 1.0, {})
        thread = threading.Thread(target=holder.run)
        thread.start()
        try:
            with pytest.raises(WeightsError, match=r"does not answer|has ended"):
                wait_until(lambda: weights_held.find(tmp_path, "tiles") is not None)
        finally:
            thread.join()


def test_a_holder_of_another_user_is_not_believed(tmp_path, held, monkeypatch):
    with monkeypatch.context() as patched:  # undone before the holder is released
        patched.setattr(weights_held, "user_of", lambda peer: os.geteuid() + 1)
        with pytest.raises(WeightsError, match=r"user \d+ answers in their place"):
            weights_held.attach(tmp_path, "tiles")


GOOD = asdict(Held("/x", "tiles", 7, 1, 0, 600.0, 1.0))


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"", "has ended"),
        (b"no", "sent what it may not"),
        (REPLY.pack(b"hlh0", Verb.ATTACH) + json.dumps(GOOD).encode(), "sent what it may not"),
        (REPLY.pack(MAGIC, Verb.INFO) + json.dumps(GOOD).encode(), "sent what it may not"),
        (REPLY.pack(MAGIC, Verb.ATTACH) + b"{", "sent what it may not"),
        (REPLY.pack(MAGIC, Verb.ATTACH) + b"[]", "sent what it may not"),
        (REPLY.pack(MAGIC, Verb.ATTACH) + json.dumps({**GOOD, "pid": "1"}).encode(), "pid of another type"),
        (REPLY.pack(MAGIC, Verb.ATTACH) + json.dumps({**GOOD, "idle_left_s": "1"}).encode(), "idle_left_s of another"),
        (REPLY.pack(MAGIC, Verb.ATTACH) + json.dumps(GOOD).encode(), "sent 0 descriptors, expected 1"),
    ],
)
def test_a_holder_that_sends_what_it_may_not_is_refused(tmp_path, packet, message):
    def answer() -> None:
        client, _ = server.accept()
        with client:
            client.recv(100)
            if packet:
                client.send(packet)

    with weights_held.claim(tmp_path, "tiles") as server:
        server.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(WeightsError, match=message):
            weights_held.attach(tmp_path, "tiles")
        thread.join()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86400), (" 1.5 ", 1.5)])
def test_times_are_read(text, seconds):
    assert parse_idle(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "m", "-1s", "1w", "nan", "inf", "31d", "1 m", "٣m", "9" * 400])
def test_other_times_are_refused(text):
    with pytest.raises(ConfigError, match="expected a time such as 90s, 30m or 2h"):
        parse_idle(text)
