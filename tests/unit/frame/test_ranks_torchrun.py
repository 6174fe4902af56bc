"""The same ranks under torchrun: the first process has the engine, the others follow it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_ranks_faults import listening

import hybridlab as hl
from hybridlab.engine.ranks_joined import address_of
from hybridlab.errors import ConfigError

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_bf16"
EXPECTED = json.loads((ORACLE / "expected.json").read_text())["requests"]

LOOPBACK = "0100007F"

_SCRIPT = """
import json, os, sys, time
import hybridlab as hl
folder, end = sys.argv[1:]
engine = hl.load(folder, ranks="torchrun", precision="exact", quiet=True, kv_tokens=1024, threads=1)
requests = json.load(open(folder + "/expected.json"))["requests"]
print(json.dumps([engine.generate(request["prompt"], 24) for request in requests]), flush=True)
if end == "wait":
    sys.stdin.readline()
    try:
        engine.generate([1, 2, 3], 4)
    except hl.HybridlabError as error:
        print(error, flush=True)
if end.startswith("/"):
    open(end + "/there", "w").close()
    while not os.path.exists(end + "/go"):
        time.sleep(0.05)
if end == "close":
    engine.close()
print("done", flush=True)
"""


def torchrun(tmp_path: Path, end: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT, encoding="utf-8")
    how = ["--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, "-m", "torch.distributed.run", *how, str(script), str(ORACLE), end]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize(("end", "ranks"), [pytest.param("close", 3, marks=pytest.mark.slow), ("leave", 2)])
def test_tokens_are_those_of_the_oracle(tmp_path, end, ranks):
    done = torchrun(tmp_path, end, ranks)
    assert done.returncode == 0, done.stderr
    tokens, last = done.stdout.strip().split("\n")
    assert json.loads(tokens) == [request["greedy"] for request in EXPECTED]
    assert last == "done"


def test_two_nodes_meet_and_their_ranks_listen_on_loopback_alone(tmp_path):
    """Two torchruns; see test_ranks_two_hosts for those that are on different hosts."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nodes = []
    for node in (0, 1):
        how = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--master-port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *how, str(script), str(ORACLE), str(tmp_path)]
        nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
    try:
        end_s = time.monotonic() + 90
        while not (tmp_path / "there").exists():
            assert time.monotonic() < end_s and all(node.poll() is None for node in nodes)
            time.sleep(0.05)
        ranks = [Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split() for node in nodes]
        assert [len(pids) for pids in ranks] == [1, 1]
        assert {address for (pid,) in ranks for address in listening(int(pid))} == {LOOPBACK}
        (tmp_path / "go").touch()
        out, _ = nodes[0].communicate(timeout=60)
        tokens, last = out.strip().split("\n")
        assert json.loads(tokens) == [request["greedy"] for request in EXPECTED] and last == "done"
        assert [node.wait(30) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def test_a_lost_follower_is_named(tmp_path):
    """Without torchrun itself, which ends the others as soon as one has ended."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(3):
        where = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(script), str(ORACLE), "wait"]
        pipe = subprocess.PIPE if rank == 0 else None
        env = {**os.environ, **where}
        processes.append(subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe))
    leader, *followers = processes
    try:
        assert json.loads(leader.stdout.readline()) == [request["greedy"] for request in EXPECTED]
        assert {address for process in processes for address in listening(process.pid)} == {LOOPBACK}
        followers[1].kill()
        out, _ = leader.communicate("go\n", timeout=60)
        assert "rank 2" in out and "all 3 ranks were stopped" in out
        assert leader.returncode == 0
        assert followers[0].wait(30) is not None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_outside_of_torchrun_it_is_said_so(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="ranks is 'torchrun', but this is not a process of torchrun"):
        hl.load(ORACLE, ranks="torchrun")


def test_an_address_that_is_not_the_interfaces_is_refused(monkeypatch):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.2", "MASTER_PORT": "29578"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    words = "MASTER_ADDR is '127.0.0.2', expected 127.0.0.1, the address of interface 'lo'"
    with pytest.raises(ConfigError, match=re.escape(words)):
        hl.load(ORACLE, ranks="torchrun")


def test_a_port_that_somebody_has_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"MASTER_PORT '{port}', where none can listen: .*in use"):
            hl.load(ORACLE, ranks="torchrun")


def test_an_interface_has_an_address_or_is_refused():
    assert address_of("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"interface 'nowhere0' has no address .* this machine has .*lo"):
        address_of("nowhere0")
    with pytest.raises(ConfigError, match="interface is 3, expected the name of a network interface"):
        hl.load(ORACLE, ranks=2, interface=3)  # type: ignore[arg-type]
