"""Strategies of other packages: found by the name that their metadata give them, imported when asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import hybridlab as hl
from hybridlab.errors import StrategyError
from hybridlab.strategies import registry

MODULE = """
from dataclasses import dataclass

from hybridlab.plans import ExpertPath, PlacementPlan
from hybridlab.strategies.scheduler.fcfs import FCFS


@dataclass(frozen=True)
class Lazy:
    chunk_tokens: int = 4

    def schedule(self, queue):
        return FCFS(self.chunk_tokens).schedule(queue)


class Host:
    def place(self, model, hardware, routing):
        return PlacementPlan()

    def expert_path(self, num_tokens, placed, hardware):
        return ExpertPath()

    def update(self, routing):
        return ()


class Plain:
    def num_microbatches(self, step):
        return 1

    def arrange(self, ops):
        return ops
"""


def install(folder: Path, package: str, points: dict[str, dict[str, str]], version: str = "1.5") -> None:
    """What an installer leaves behind of a package: its metadata."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", "utf-8")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines), "utf-8")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages on sys.path, with a module of strategies in it."""
    (tmp_path / "lazy_strategies.py").write_text(MODULE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("lazy_strategies", None)


@pytest.mark.parametrize(
    ("kind", "cls", "check"),
    [
        ("scheduler", "Lazy", hl.check_scheduler),
        ("placement", "Host", hl.check_placement),
        ("overlap", "Plain", hl.check_overlap),
    ],
)
def test_a_strategy_of_a_package_goes_by_its_name(site, kind, cls, check):
    install(site, "lazy-package", {f"hybridlab.{kind}s": {"theirs": f"lazy_strategies:{cls}"}})
    assert registry.names(kind)[-1] == "theirs"
    assert "lazy_strategies" not in sys.modules, "imported before it was asked for"
    found = registry.resolve(kind, "theirs")
    assert type(found).__name__ == cls and registry.label(found) == "theirs"
    assert registry.describe(found)["package"] == "lazy-package 1.5"
    check(found)


def test_fields_are_given_and_checked_as_for_any_other(site):
    install(site, "lazy-package", {"hybridlab.schedulers": {"lazy": "lazy_strategies:Lazy"}})
    assert registry.fields(registry.resolve("scheduler", {"name": "lazy", "chunk_tokens": 7})) == {"chunk_tokens": 7}
    with pytest.raises(StrategyError, match="has no field 'chunk'; did you mean 'chunk_tokens'"):
        registry.resolve("scheduler", {"name": "lazy", "chunk": 7})
    with pytest.raises(StrategyError, match="unknown scheduler 'lasy'; did you mean 'lazy'"):
        registry.resolve("scheduler", "lasy")


def test_what_is_installed_later_is_found(site):
    with pytest.raises(StrategyError, match="unknown scheduler 'lazy'"):
        registry.resolve("scheduler", "lazy")
    install(site, "lazy-package", {"hybridlab.schedulers": {"lazy": "lazy_strategies:Lazy [extra]"}})
    assert type(registry.resolve("scheduler", "lazy")).__name__ == "Lazy"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere_at_all:X", r"cannot import module 'nowhere_at_all' \(ModuleNotFoundError"),
        ("lazy_strategies:Nothing", "module 'lazy_strategies' has no class 'Nothing'"),
    ],
)
def test_an_entry_point_that_cannot_be_loaded_is_named_with_its_package(site, target, words):
    install(site, "lazy-package", {"hybridlab.schedulers": {"lazy": target}})
    assert "lazy" in registry.names("scheduler")
    with pytest.raises(StrategyError, match=words + ".*entry point 'lazy' of package 'lazy-package'"):
        registry.resolve("scheduler", "lazy")


def test_a_class_of_another_kind_is_refused(site):
    install(site, "lazy-package", {"hybridlab.schedulers": {"lazy": "lazy_strategies:Plain"}})
    with pytest.raises(StrategyError, match=r"scheduler Plain has no method schedule\(\)"):
        registry.resolve("scheduler", "lazy")


def test_a_name_that_two_give_is_refused(site):
    install(site, "lazy-package", {"hybridlab.schedulers": {"fcfs": "lazy_strategies:Lazy"}})
    assert registry.names("scheduler").count("fcfs") == 1
    with pytest.raises(StrategyError, match=r"'fcfs' is given by hybridlab \(.*\) and by package 'lazy-package'"):
        registry.resolve("scheduler", "fcfs")
    assert registry.resolve("scheduler", "hybridlab.strategies.scheduler.fcfs:FCFS")
    assert registry.resolve("scheduler", "chunked_prefill")


def test_a_name_that_two_packages_give_is_refused(site):
    for package in ("lazy-package", "other-package"):
        install(site, package, {"hybridlab.schedulers": {"lazy": "lazy_strategies:Lazy"}})
    with pytest.raises(StrategyError, match=r"'lazy-package'.* and by package 'other-package'"):
        registry.resolve("scheduler", "lazy")
