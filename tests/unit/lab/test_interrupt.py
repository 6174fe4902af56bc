"""Ctrl-C in a notebook's cell: the run ends at once, the store is whole, and the kernel goes on."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import hybridlab as hl
from hybridlab import device_lock
from hybridlab.device_lock import alone_if_free

LENGTHS = {"prompt_tokens": 5, "output_tokens": 400}
BUSY = {"kind": "offline", "num_requests": 2, **LENGTHS}
THINKING = {
    "kind": "closed_loop",
    "num_users": 1,
    "think_s": 1e6,
    "num_requests": 2,
    "prompt_tokens": 5,
    "output_tokens": 2,
}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, *, num_tokens: int) -> None:
    """One SIGINT to this process, a moment after the engine has drawn so many tokens."""
    serve, drawn, main = hl.Engine.serve, [0], threading.main_thread().ident

    def interrupted(self: Any, requests: Any, scheduler: Any, *, on_event: Any) -> Any:
        def noticed(record: Any, token: int) -> None:
            on_event(record, token)
            drawn[0] += 1
            if drawn[0] == num_tokens:
                threading.Timer(0.02, signal.pthread_kill, (main, signal.SIGINT)).start()

        return serve(self, requests, scheduler, on_event=noticed)

    monkeypatch.setattr(hl.Engine, "serve", interrupted)


@pytest.mark.parametrize("workload", [BUSY, THINKING], ids=["in a step", "waiting for an arrival"])
def test_the_kernel_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workload: dict[str, Any]
) -> None:
    monkeypatch.setattr(device_lock, "lock_folder", lambda: tmp_path)
    config = {
        "experiment": "interrupted",
        "model": {"path": str(hl.make_checkpoint(tmp_path / "tiny", "tiny", layers=1, progress=False).folder)},
        "workload": workload,
        "engine": {"kv_tokens": 1024, "token_budget": 64},
    }
    with monkeypatch.context() as patch:
        interrupt_at(patch, num_tokens=2)
        with pytest.raises(KeyboardInterrupt):
            hl.run(config, results_dir=tmp_path / "results", progress=False)
    assert "0 of 1 runs are done and stored; calling again resumes" in capsys.readouterr().err
    with alone_if_free("cpu") as free:
        assert free
    assert "hybridlab-worker" not in [thread.name for thread in threading.enumerate()]
    assert not list((tmp_path / "results").glob("*/*"))
    short = {**config, "workload": {"kind": "offline", "num_requests": 1, "prompt_tokens": 5, "output_tokens": 4}}
    assert hl.sweep(short, results_dir=tmp_path / "results", progress=False)["completed"].tolist() == [1]
