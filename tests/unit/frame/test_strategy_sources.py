"""Whatever changes what a strategy does changes its identity; nothing else does."""

from __future__ import annotations

import linecache
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any

import pytest

from hybridlab.provenance import digest, strategy_files_hash
from hybridlab.strategies import registry
from hybridlab.strategies.scheduler.fcfs import FCFS

METHOD = " def schedule(self, queue):\n"
CHANGES = {
    "a global": "K = 1\nclass S:\n" + METHOD + "  return K",
    "a global that is None at first": "K = 1\nL = None if K == len('x') else 3\nclass S:\n" + METHOD + "  return L",
    "a global in a generator": "K = 1\nclass S:\n" + METHOD + "  return any(r.x > K for r in queue.running)",
    "a global in a sort key": "K = 1\nclass S:\n" + METHOD + "  return sorted(queue.waiting, key=lambda r: K * r.x)",
    "a base class": "class B:\n" + METHOD + "  return 1\nclass S(B): pass",
    "a helper of a helper": "def g(): return 1\ndef f(): return g()\nclass S:\n" + METHOD + "  return f()",
    "a helper's constant": "K = 1\ndef f(): return K\nclass S:\n" + METHOD + "  return f()",
    "a helper class": "class H:\n x = 1\nclass S:\n" + METHOD + "  return H().x",
    "a property": "K = 1\nclass S:\n @property\n def k(self): return K\n" + METHOD + "  return self.k",
    "a static method": "K = 1\nclass S:\n @staticmethod\n def k(): return K\n" + METHOD + "  return self.k()",
    "a decorated method": "import functools\nK = 1\nclass S:\n @functools.cache\n" + METHOD + "  return K",
    "a table": "import numpy as np\nT = np.zeros(5000)\nT[2000] = 1\nclass S:\n" + METHOD + "  return T",
    "a long list": "T = [0] * 1000 + [1]\nclass S:\n" + METHOD + "  return T",
    "an object": "class O: pass\nT = O()\nT.x = 1\nclass S:\n" + METHOD + "  return T",
    "a field": "import numpy\nclass S:\n def __init__(self): self.t = numpy.full(5000, 1)\n" + METHOD + "  return 0",
    "a closure": "def make(n):\n class C:\n " + METHOD + "   return n\n return C()\nS = lambda: make(1)",
    "a module": "import used_by_strategy\nclass S:\n" + METHOD + "  return used_by_strategy.K",
}


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The identity of `S()` of a module with the given text, as a new process would see it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def identify(text: str) -> str:
        for name in ("strategy_of_a_user", "used_by_strategy"):
            sys.modules.pop(name, None)
        (tmp_path / "strategy_of_a_user.py").write_text(text + "\n")
        (tmp_path / "used_by_strategy.py").write_text(f"K = {2 if '# 2' in text else 1}\n")
        linecache.clearcache()
        invalidate_caches()
        return digest(registry.describe(import_module("strategy_of_a_user").S()))

    return identify


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_changes_the_identity(identity: Callable[[str], str], what: str) -> None:
    text = CHANGES[what]
    changed = text.replace("1", "2") if what != "a module" else text + " # 2"
    unrelated = text + "\ndef unrelated(): return 3"
    assert identity(text) == identity(text) != identity(changed)
    assert identity(text) == identity(unrelated)


SCRIPT = """
from dataclasses import dataclass, field
import numpy as np
from hybridlab.plans import StepPlan
from hybridlab.provenance import digest
from hybridlab.strategies import registry
from hybridlab.strategies.scheduler.fcfs import FCFS
class Thing: pass
THING = Thing()
THING.names = {"a", "b", "zz"}
exec('''
@dataclass(frozen=True)
class S(FCFS):
    table: dict = field(default_factory=lambda: {"x": {1, 2, "q"}})
    def schedule(self, queue):
        chosen = lambda r: r.id in {"u", "v", "w"} and THING and np.zeros(3)
        return StepPlan("decode", {r.id: 1 for r in queue.running if chosen(r)})
''')
print(digest(registry.describe(S())))
"""


def test_the_identity_is_the_same_in_every_process() -> None:
    """Sets, objects without a repr and code without a source file included."""
    found = set()
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1


def test_a_strategy_that_builds_on_ours_depends_on_our_files() -> None:
    class Mine(FCFS):
        pass

    class Alone:
        def schedule(self, queue: Any) -> None:
            return None

    assert strategy_files_hash(Mine()) != "" != strategy_files_hash(FCFS())
    assert strategy_files_hash(Alone()) == ""
