"""Find a strategy by name, by "module:Class" or as an object; describe one for the manifest."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hybridlab.errors import StrategyError
from hybridlab.strategies.base import Overlap, Placement, Scheduler
from hybridlab.strategies.sources import Sources, content, source_of

_BUILTIN: dict[str, dict[str, str]] = {
    "scheduler": {
        "fcfs": "hybridlab.strategies.scheduler.fcfs:FCFS",
        "chunked_prefill": "hybridlab.strategies.scheduler.chunked_prefill:ChunkedPrefill",
    },
    "placement": {
        "all_host": "hybridlab.strategies.placement.all_host:AllHost",
        "all_resident": "hybridlab.strategies.placement.all_resident:AllResident",
        "hot_resident": "hybridlab.strategies.placement.hot_resident:HotResident",
        "layer_split": "hybridlab.strategies.placement.layer_split:LayerSplit",
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
    """The built-in strategies of a kind ("scheduler", "placement" or "overlap")."""
    return tuple(_BUILTIN[kind])


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
        target = _target(kind, value["name"]) if "name" in value else value["class"]
        value = _construct(kind, _load(kind, target), fields)
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
    """What identifies a strategy: class, fields, source of its class, and what that reaches (`strategies.sources`)."""
    cls = type(strategy)
    return {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "fields": fields(strategy),
        "source": source_of(cls),
        "globals": Sources(strategy).texts,
    }


def fields(strategy: Any) -> dict[str, Any]:
    """The fields of a strategy as plain data; what is no number, text or None becomes a text of its content."""
    if dataclasses.is_dataclass(strategy) and not isinstance(strategy, type):
        found = {field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)}
    else:
        found = vars(strategy)
    return {name: _plain(value) for name, value in found.items()}


def label(strategy: Any) -> str:
    """The registered name of a built-in strategy, else the name of its class."""
    path = f"{type(strategy).__module__}:{type(strategy).__qualname__}"
    for entries in _BUILTIN.values():
        for name, target in entries.items():
            if target == path:
                return name
    return type(strategy).__name__


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


def _target(kind: str, name: Any) -> str:
    if isinstance(name, str) and name in _BUILTIN[kind]:
        return _BUILTIN[kind][name]
    near = difflib.get_close_matches(str(name), _BUILTIN[kind], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(names(kind))
    raise StrategyError(f"unknown {kind} {name!r}{hint} (known: {known}, or 'module:Class')")


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
