from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from hybridlab import __version__
from hybridlab.errors import ConfigError
from hybridlab.figures import latency_cdf, load_curves, save, save_figure, ttft_throughput
from hybridlab.figures.files import write_whole

ONE_LOAD = {"workload.rate_scale": 1}


def test_files_say_where_they_come_from(tables: Any, tmp_path: Path) -> None:
    ax = latency_cdf(tables(), where=ONE_LOAD)
    written = save_figure(ax, tmp_path / "new" / "fig.png", command="make it")
    assert sorted(written) == [".json", ".pdf", ".png", ".svg"]
    assert all(path.parent == tmp_path / "new" and path.stem == "fig" for path in written.values())
    assert sorted(os.listdir(tmp_path / "new")) == ["fig.json", "fig.pdf", "fig.png", "fig.svg"]
    assert json.loads(written[".json"].read_text()) == {
        "figure": "fig",
        "command": "make it",
        "run_ids": ["fcfs-1-0", "fcfs-1-1", "chunked-1-0", "chunked-1-1"],  # what is drawn, not all of the table
        "evidence": ["measured"],
        "machine": ["test CPU, 2 cores"],
        "code": ["c0ffee"],
        "hybridlab": __version__,
    }
    told = (
        f"hybridlab {__version__} runs fcfs-1-0, fcfs-1-1, chunked-1-0, chunked-1-1; evidence measured; "
        "machine test CPU, 2 cores; code c0ffee; command: make it"
    )
    for suffix in (".png", ".svg", ".pdf"):
        assert told.encode() in written[suffix].read_bytes()


def test_fonts_are_embedded_truetype(tables: Any, tmp_path: Path) -> None:
    with plt.rc_context({"pdf.fonttype": 3, "svg.fonttype": "path"}):
        written = save_figure(ttft_throughput(tables()), tmp_path / "fig", command="")
    pdf = written[".pdf"].read_bytes()
    assert b"/Type3" not in pdf and b"/Type /Font" in pdf and b"/FontFile2" in pdf
    assert "output throughput (tokens/s)" in written[".svg"].read_text()  # text, not outlines


def test_no_file_holds_a_time(tables: Any, tmp_path: Path) -> None:
    written = save_figure(ttft_throughput(tables()), tmp_path / "fig", command="")
    year = time.strftime("%Y").encode()
    assert b"CreationDate" not in written[".pdf"].read_bytes() and b"ModDate" not in written[".pdf"].read_bytes()
    assert b"<dc:date>" not in written[".svg"].read_bytes()
    assert b"tIME" not in written[".png"].read_bytes()
    assert year not in written[".json"].read_bytes()


DRAW = """
import sys
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
sys.path.insert(0, sys.argv[1])
from conftest import make_tables
from hybridlab.figures import save_figure, ttft_throughput
save_figure(ttft_throughput(make_tables()), Path(sys.argv[2]) / "fig", command="c")
"""


def test_another_process_makes_the_same_bytes(tmp_path: Path) -> None:
    """Two processes whose hashes of strings differ; the order of sets must not show."""
    for seed in ("1", "2"):
        words = [sys.executable, "-c", DRAW, str(Path(__file__).parent), str(tmp_path / seed)]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert len(first) == 4 and first == second


def test_two_panels_and_figures_of_ones_own(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "FORMATS", (".svg",))  # the others take longer
    written = save_figure(load_curves(tables(), where={"scheduler": "fcfs"}), tmp_path / "pair", command="")
    assert len(json.loads(written[".json"].read_text())["run_ids"]) == 6
    figure, axes = plt.subplots(1, 2)
    ttft_throughput(tables(), axes[0], where={"scheduler": "fcfs"})
    latency_cdf(tables(), axes[1], where={"workload.rate_scale": 1, "scheduler": "chunked"})
    written = save_figure(figure, tmp_path / "both", command="")
    assert len(json.loads(written[".json"].read_text())["run_ids"]) == 8
    _, ax = plt.subplots()
    written = save_figure(ax, tmp_path / "own", run_ids=["abc"], command="by hand")
    told = json.loads(written[".json"].read_text())
    assert (told["run_ids"], told["machine"]) == (["abc"], [])
    with pytest.raises(ConfigError, match="save_figure: nothing drawn"):
        save_figure([], tmp_path / "none", command="")


def test_a_full_disk_leaves_nothing(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ax = ttft_throughput(tables())
    old = {path: path.read_bytes() for path in save_figure(ax, tmp_path / "fig", command="old").values()}
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"fig\.pdf: figure cannot be written \(No space left on device\)"):
        save_figure(ax, tmp_path / "fig", command="new")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_files_that_cannot_be_written(tables: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=re.escape("fig.png: figure cannot be written")):
        save_figure(ttft_throughput(tables()), tmp_path / "file" / "fig", command="")
    with pytest.raises(ConfigError, match="thing cannot be written"):
        write_whole({tmp_path / "file" / "x": b""}, "thing")


def test_noise_of_the_layout_does_not_show(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kiwisolver's last digits depend on where things lie in memory."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    plain = ConstrainedLayoutEngine.execute
    monkeypatch.setattr(save, "FORMATS", (".svg", ".png"))
    files = []
    for noise in (0.0, 1e-13):

        def noisy(self: Any, fig: Any, noise: float = noise) -> Any:
            done = plain(self, fig)
            for ax in fig.axes:
                x, y, width, height = ax.get_position(original=True).bounds
                ax._set_position([x + noise, y + noise, width - noise, height + noise])
            return done

        monkeypatch.setattr(ConstrainedLayoutEngine, "execute", noisy)
        ax = load_curves(tables(loads=[1], repeats=1))
        written = save_figure(ax, tmp_path / str(noise) / "fig", command="")
        files.append([path.read_bytes() for path in written.values()])
        assert ax[0].figure.get_layout_engine() is not None and all(one.get_in_layout() for one in ax)
    assert files[0] == files[1]
