"""Find a strategy by name, by "module:Class" or as an object; describe one for the manifest."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hybridlab.errors import StrategyError
from hybridlab.strategies import entry_points
from hybridlab.strategies.base import Overlap, Placement, Scheduler
from hybridlab.strategies.sources import Sources, content, source_of

_BUILTIN: dict[str, dict[str, str]] = {
    "scheduler": {
        "fcfs": "hybridlab.strategies.scheduler.fcfs:FCFS",
        "chunked_prefill": "hybridlab.strategies.scheduler.chunked_prefill:ChunkedPrefill",
        "paper": "hybridlab.strategies.scheduler.paper:Paper",
    },
    "placement": {
        "all_host": "hybridlab.strategies.placement.all_host:AllHost",
        "all_resident": "hybridlab.strategies.placement.all_resident:AllResident",
        "hot_resident": "hybridlab.strategies.placement.hot_resident:HotResident",
        "layer_split": "hybridlab.strategies.placement.layer_split:LayerSplit",
        "lru_cache": "hybridlab.strategies.placement.lru_cache:LruCache",
        "streamed": "hybridlab.strategies.placement.streamed:Streamed",
    },
    "overlap": {
        "sequential": "hybridlab.strategies.overlap.sequential:Sequential",
        "prefetch": "hybridlab.strategies.overlap.prefetch:Prefetch",
        "dual_batch": "hybridlab.strategies.overlap.dual_batch:DualBatch",
    },
}
_PROTOCOLS = {"scheduler": Scheduler, "placement": Placement, "overlap": Overlap}


def names(kind: str) -> tuple[str, ...]:
    """The strategies of a kind ("scheduler", "placement" or "overlap"): the built-in ones, then those of packages."""
    return tuple(dict.fromkeys((*_BUILTIN[kind], *entry_points.find(kind))))


def resolve(kind: str, value: Any) -> Any:
    """A strategy of `kind` from a name, `{name: ..., **fields}`, `{class: "module:Class", **fields}` or an object.

    Raises `StrategyError` naming the unknown name, module, class or field, and what was expected.
    """
    if isinstance(value, str):
        value = {"class": value} if ":" in value else {"name": value}
    if isinstance(value, Mapping):
        fields = {k: v for k, v in value.items() if k not in ("name", "class")}
        if ("name" in value) == ("class" in value):
            raise StrategyError(f"{kind}: give either 'name' or 'class', got keys {sorted(map(str, value))}")
        cls = _named(kind, value["name"]) if "name" in value else _load(kind, value["class"])
        value = _construct(kind, cls, fields)
    if isinstance(value, type):
        raise StrategyError(f"{kind}: got the class {value.__name__}; pass an object, {value.__name__}()")
    name = f"{kind} {type(value).__name__}"
    for method, parameters in _methods(kind).items():
        own = getattr(value, method, None)
        if not callable(own):
            raise StrategyError(f"{name} has no method {method}()")
        if not _takes(own, len(parameters)):
            given = ", ".join(parameters)
            raise StrategyError(f"{name}: {method}() is given {given}; define it as {method}(self, {given})")
    return value


def describe(strategy: Any) -> dict[str, Any]:
    """What identifies a strategy: class, fields, source of its class, and what that reaches (`strategies.sources`).

    Sources of installed packages are not followed: one that an entry point names is told by its version.
    """
    cls = type(strategy)
    packages = [f"{one.package} {one.version}" for one in _foreign(cls)[1]]
    return {
        "class": _path(cls),
        "fields": fields(strategy),
        "source": source_of(cls),
        "globals": Sources(strategy).texts,
        **({"package": packages[0]} if packages else {}),
    }


def fields(strategy: Any) -> dict[str, Any]:
    """The fields of a strategy as plain data; what is no number, text or None becomes a text of its content."""
    if dataclasses.is_dataclass(strategy) and not isinstance(strategy, type):
        found = {field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)}
    else:
        found = vars(strategy)
    return {name: _plain(value) for name, value in found.items()}


def label(strategy: Any) -> str:
    """The registered name of a strategy, else the name of its class."""
    cls = type(strategy)
    for entries in _BUILTIN.values():
        for name, target in entries.items():
            if target == _path(cls):
                return name
    return _foreign(cls)[0] or cls.__name__


def _foreign(cls: type) -> tuple[str, tuple[entry_points.Foreign, ...]]:
    """The name that an entry point gives a class, and who gives it; ("", ()) if none does."""
    for kind in _BUILTIN:
        for name, brought in entry_points.find(kind).items():
            if any(one.target == _path(cls) for one in brought):
                return name, brought
    return "", ()


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _methods(kind: str) -> dict[str, list[str]]:
    """The methods of an interface, and what each is given."""
    return {
        name: list(inspect.signature(method).parameters)[1:]
        for name, method in vars(_PROTOCOLS[kind]).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }


def _takes(method: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(method).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        pass  # compiled methods may have no signature to look at
    return True


def _named(kind: str, name: Any) -> type:
    """The class that is registered as `name`; raises `StrategyError` if there is none, or more than one."""
    if not isinstance(name, str) or name not in names(kind):
        entry_points.look_again()
    if not isinstance(name, str) or name not in names(kind):
        near = difflib.get_close_matches(str(name), names(kind), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(names(kind))
        raise StrategyError(f"unknown {kind} {name!r}{hint} (known: {known}, or 'module:Class')")
    builtin, brought = _BUILTIN[kind].get(name), entry_points.find(kind).get(name, ())
    if len(brought) + (builtin is not None) > 1:
        given = [f"hybridlab ({builtin!r})"] if builtin else []
        given += [f"package {foreign.package!r} ({foreign.target!r})" for foreign in brought]
        raise StrategyError(f"{kind} {name!r} is given by {' and by '.join(given)}; name the one you mean by its class")
    if builtin is not None:
        return _load(kind, builtin)
    try:
        return _load(kind, brought[0].target)
    except StrategyError as error:
        raise StrategyError(f"{error}; entry point {name!r} of package {brought[0].package!r}") from None


def _load(kind: str, target: Any) -> type:
    module_name, _, class_name = str(target).partition(":")
    if not module_name or module_name.startswith("."):
        raise StrategyError(f"{kind} {target!r}: expected 'module:Class' with the whole name of a module")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StrategyError(f"{kind} {target!r}: cannot import module {module_name!r} ({reason})") from None
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        raise StrategyError(f"{kind} {target!r}: module {module_name!r} has no class {class_name!r}")
    return cls


def _construct(kind: str, cls: type, fields: Mapping[str, Any]) -> Any:
    try:
        parameters = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        parameters = {}
    for key in fields:
        if key not in parameters:
            near = difflib.get_close_matches(str(key), parameters, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise StrategyError(
                f"{kind} {cls.__name__} has no field {key!r}{hint} (fields: {', '.join(parameters) or 'none'})"
            )
    try:
        return cls(**fields)
    except (TypeError, ValueError, StrategyError) as error:
        raise StrategyError(f"{kind} {cls.__name__}: {error}") from None


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else content(value)
