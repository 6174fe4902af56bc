"""ServeGen clients in archives and folders: nothing is unpacked, nothing grows without limit."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from hybridlab.errors import ConfigError
from hybridlab.workload import Workload, archive, content_hash, load_rows

SLICE = Path(__file__).resolve().parents[3] / "experiments" / "data" / "servegen_deepseek_r1_slice"


def servegen(path: Path = SLICE, **keys: Any) -> Any:
    keys = {"kind": "servegen", "path": str(path), "num_requests": 2, **keys}
    return TypeAdapter(Workload).validate_python(keys)


def rows(path: Path = SLICE, **keys: Any) -> list[Any]:
    return load_rows(servegen(path, **keys), Path())


def tarred(path: Path, files: dict[str, bytes], mode: Any = "w:gz") -> Path:
    with tarfile.open(path, mode) as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return path


def slice_files(prefix: str = "deepseek-r1/") -> dict[str, bytes]:
    return {prefix + path.name: path.read_bytes() for path in SLICE.iterdir()}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_is_its_folder(tmp_path: Path, mode: str) -> None:
    path = tarred(tmp_path / "clients.tar", slice_files(), mode)
    assert rows(path, num_requests=2000) == rows(num_requests=2000)
    assert content_hash(servegen(path), Path()) != content_hash(servegen(), Path())


def test_files_that_are_missing(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    folder.mkdir()
    (folder / "chunk-0-trace.csv").write_text("0,1,1,Gamma,1,1\n600,1,1,Gamma,1,1\n")
    with pytest.raises(ConfigError, match=r"clients: no chunk-0-dataset\.json beside chunk-0-trace\.csv"):
        rows(folder)
    (folder / "chunk-0-trace.csv").unlink()
    with pytest.raises(ConfigError, match=r"clients: no \*-trace\.csv; expected ServeGen clients"):
        rows(folder)
    with pytest.raises(ConfigError, match=r"workload\.path: .*none: cannot be read \(No such file"):
        rows(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match=r"empty: not a whole tar archive"):
        rows(tmp_path / "empty")


def test_archives_that_are_damaged_or_mixed(tmp_path: Path) -> None:
    whole = tarred(tmp_path / "whole.tar.gz", slice_files()).read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"half\.tar\.gz: not a whole tar archive"):
        rows(tmp_path / "half.tar.gz")
    (tmp_path / "text.tar.gz").write_text("no archive at all\n" * 100)
    with pytest.raises(ConfigError, match=r"text\.tar\.gz: not a whole tar archive"):
        rows(tmp_path / "text.tar.gz")
    two = tarred(tmp_path / "two.tar.gz", {**slice_files("a/"), **slice_files("b/")})
    with pytest.raises(ConfigError, match="clients in 'a' and in 'b'; expected one folder"):
        rows(two)
    twice = tmp_path / "twice.tar"
    with tarfile.open(twice, "w") as out:
        for _ in range(2):
            out.addfile(tarfile.TarInfo("chunk-0-trace.csv"))
    with pytest.raises(ConfigError, match=r"twice\.tar: chunk-0-trace\.csv: is there twice"):
        rows(twice)


def test_links_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as out:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("chunk-0-trace.csv")
            member.type, member.linkname = kind, str(SLICE / "chunk-23-trace.csv")
            out.addfile(member)
    with pytest.raises(ConfigError, match=r"no \*-trace\.csv"):
        rows(path)
    assert [child.name for child in tmp_path.iterdir()] == ["links.tar"]  # nothing was unpacked


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = tarfile.TarInfo("chunk-0-trace.csv")
    claim.size = 2**40
    (tmp_path / "claim.tar").write_bytes(claim.tobuf() + b"0" * 10_240)
    with pytest.raises(ConfigError, match=r"chunk-0-trace\.csv: 1,099,511,627,776 bytes; expected at most 67,108,864"):
        rows(tmp_path / "claim.tar")
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 200_000)
    zeros = tarred(tmp_path / "zeros.tar.gz", {"elsewhere.bin": bytes(3_000_000), **slice_files()})
    with pytest.raises(ConfigError, match=r"zeros\.tar\.gz: unpacks to more than 200,000 bytes"):
        rows(zeros)
    header = tarfile.TarInfo("extended")  # whose value is read whole, as it says how long it is
    header.type, header.size = tarfile.XHDTYPE, 2**40
    (tmp_path / "header.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1_000_000))
    with pytest.raises(ConfigError, match=r"header\.tar: unpacks to more than 200,000 bytes"):
        rows(tmp_path / "header.tar")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    with pytest.raises(ConfigError, match=r"many\.tar: more than 3 members"):
        rows(tarred(tmp_path / "many.tar", {f"{n}": b"" for n in range(5)}, "w"))


def test_too_much_to_keep_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_KEPT_BYTES", 1_500)
    for path in (SLICE, tarred(tmp_path / "clients.tar", slice_files(), "w")):
        with pytest.raises(ConfigError, match="more than 1,500 bytes of clients"):
            rows(path)
    monkeypatch.setattr(archive, "MAX_MEMBER_BYTES", 900)
    with pytest.raises(ConfigError, match=r"chunk-\d+-trace\.csv: \d+,?\d* bytes; expected at most 900"):
        rows()
