"""The same ranks on two hosts: network namespaces with a cable between them, as an unprivileged user may make them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ORACLE = Path(__file__).parents[2] / "data" / "oracles" / "qwen3_bf16"
EXPECTED = json.loads((ORACLE / "expected.json").read_text())["requests"]
ISOLATED = ("unshare", "-Urnpm", "--fork", "--kill-child", "--mount-proc")
"""All that is started inside ends with it."""

_CABLE = """
set -e
ip link set lo up
unshare -n sleep 300 & other=$!
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
there="nsenter -t $other -n"
ip link add cable type veth peer name cable netns $other
ip addr add 10.77.0.1/24 dev cable
ip link set cable up
$there ip addr add 10.77.0.2/24 dev cable
$there ip link set cable up
$there ip link set lo up
"""

_LISTENING = """
import json, socket, struct

def listening():
    # Addresses of all sockets that listen in this network namespace.
    found = set()
    for table in ("tcp", "tcp6"):
        for row in map(str.split, open(f"/proc/net/{table}").read().split("\\n")[1:]):
            if row and row[3] == "0A":
                words = [struct.pack("=I", int(row[1][at : at + 8], 16)) for at in range(0, row[1].index(":"), 8)]
                family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
                found.add(socket.inet_ntop(family, b"".join(words)))
    return sorted(found)

if __name__ == "__main__":
    print(json.dumps(listening()))
"""
_SCRIPT = """
import json, subprocess, sys
from listening import listening
import hybridlab as hl

folder, *command = sys.argv[1:]
how = {"precision": "exact", "quiet": True, "kv_tokens": 1024, "threads": 1}
engine = hl.load(folder, ranks="torchrun", interface="cable", **how)
requests = json.load(open(folder + "/expected.json"))["requests"]
tokens = [engine.generate(request["prompt"], 24) for request in requests]
there = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
print(json.dumps({"tokens": tokens, "here": listening(), "there": there}), flush=True)
engine.close()
"""


def can_isolate() -> bool:
    if any(shutil.which(tool) is None for tool in ("unshare", "nsenter", "ip")):
        return False
    script = _CABLE.replace("sleep 300", "sleep 5")
    return subprocess.run([*ISOLATED, "bash", "-c", script], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not can_isolate(), reason="this user may not make network namespaces")


def between_hosts(tmp_path: Path, first: str, second: str) -> dict:
    """What the first of two hosts prints: tokens, and what listens on which host meanwhile. Each runs its command."""
    for name, text in (("script", _SCRIPT), ("listening", _LISTENING)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    parts = [
        _CABLE,
        f"python={sys.executable}",
        f'script="{tmp_path}/script.py {ORACLE} $there $python {tmp_path}/listening.py"',
        f"{second} >&2 & follower=$!",
        f"{first}",
        "wait $follower",
    ]
    command = [*ISOLATED, "bash", "-c", "\n".join(parts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().split("\n")[-1])


def test_under_torchrun_tokens_are_those_of_the_oracle(tmp_path):
    where = "--nnodes 2 --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29577"
    run = f"$python -m torch.distributed.run {where} --node-rank"
    found = between_hosts(tmp_path, f"{run} 0 $script", f"$there {run} 1 $script")
    assert found["tokens"] == [request["greedy"] for request in EXPECTED]
    # Its own store, which is no process of ours, listens on all addresses of the first host.
    assert set(found["here"]) <= {"10.77.0.1", "::", "0.0.0.0"} and set(found["there"]) == {"10.77.0.2"}


def test_with_torchruns_variables_alone_nothing_listens_but_on_the_named_interface(tmp_path):
    run = "WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29577 $python $script"
    found = between_hosts(tmp_path, f"env RANK=0 {run}", f"$there env RANK=1 {run}")
    assert found["tokens"] == [request["greedy"] for request in EXPECTED]
    assert (found["here"], found["there"]) == (["10.77.0.1"], ["10.77.0.2"])
