"""What all row traces share: files are streamed, plain or gzip, and what is damaged is named."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from hybridlab.errors import ConfigError
from hybridlab.workload import Workload, load_rows, reading

KINDS = {
    "azure": ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "2023-11-16 18:35:01,3,4\n"),
    "burstgpt": ("Timestamp,Request tokens,Response tokens\n", "1,3,4\n"),
    "mooncake": ("", '{"timestamp": 0, "input_length": 3, "output_length": 4, "hash_ids": [1]}\n'),
}


def rows(kind: str, path: Path, num_requests: int, start: int = 0) -> list[Any]:
    keys = {"kind": kind, "path": str(path), "num_requests": num_requests, "start": start}
    return load_rows(TypeAdapter(Workload).validate_python(keys), Path())


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_needed_is_read(tmp_path: Path, kind: str) -> None:
    head, line = KINDS[kind]
    path = tmp_path / "trace"
    path.write_bytes((head + line * 20_000).encode() + b"\xff\xff\n")
    assert len(rows(kind, path, 100, start=50)) == 100
    with pytest.raises(ConfigError, match=r"line 2000[12]: not UTF-8 text"):
        rows(kind, path, 20_001)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_gzip_is_named_once_it_is_reached(tmp_path: Path, kind: str) -> None:
    head, line = KINDS[kind]
    packed = gzip.compress((head + line * 50_000).encode())
    path = tmp_path / "trace.gz"
    path.write_bytes(packed[: len(packed) // 2])
    assert len(rows(kind, path, 100)) == 100
    with pytest.raises(ConfigError, match=r"trace\.gz: line \d+: damaged gzip file \(Compressed file ended"):
        rows(kind, path, 50_000)
    path.write_bytes(packed[:20] + b"\x00" * 50 + packed[70:])
    with pytest.raises(ConfigError, match=r"trace\.gz: line \d+: damaged gzip file"):
        rows(kind, path, 50_000)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"workload\.path: .*none: cannot be read \(No such file"):
        rows(kind, tmp_path / "none", 1)
    with pytest.raises(ConfigError, match=r"workload\.path: .*: cannot be read \(not a file\)"):
        rows(kind, tmp_path, 1)
    os.mkfifo(tmp_path / "pipe")  # would wait for ever
    with pytest.raises(ConfigError, match=r"workload\.path: .*pipe: cannot be read \(not a file\)"):
        rows(kind, tmp_path / "pipe", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_without_end_is_not_kept(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 1000)
    (tmp_path / "trace").write_text(KINDS[kind][0] + "1" * 5000)
    with pytest.raises(ConfigError, match=r"line [12]: longer than 1,000 bytes"):
        rows(kind, tmp_path / "trace", 1)
