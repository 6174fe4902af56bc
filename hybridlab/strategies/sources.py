"""What a strategy's decisions depend on: source texts and values, followed from its class while they are the user's.

A strategy from a notebook has no file, and an edited helper changes what it does as much as an edited method. So
base classes, helper functions and classes, closures, and the globals that any of them reads are all followed. Modules
of hybridlab, of the standard library and of installed packages are named, not followed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

MOST_CHARACTERS = 1000
_INSTALLED = tuple({*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


class Sources:
    """Everything of the user's that `strategy` reaches: `texts` by name, and the `modules` of hybridlab it uses."""

    def __init__(self, strategy: Any) -> None:
        self.texts: dict[str, str] = {}
        self.modules: set[str] = set()
        self._seen: set[int] = set()
        cls = type(strategy)
        self._class(cls)
        self.texts.pop(_name(cls), None)  # told apart, as the strategy's own source

    def _follow(self, name: str, value: Any) -> None:
        if isinstance(value, MethodType):
            value = value.__func__
        value = inspect.unwrap(value) if isinstance(value, FunctionType) else value
        if isinstance(value, ModuleType):
            self._module(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        else:
            self.texts[name] = content(value)
            self._class(type(value))

    def _module(self, module: ModuleType) -> None:
        path = getattr(module, "__file__", None)
        if self._is_ours(module.__name__) and path is not None:
            self.texts[module.__name__] = digest(Path(path).read_bytes())

    def _class(self, cls: type) -> None:
        if id(cls) in self._seen:
            return
        self._seen.add(id(cls))
        for base in cls.__bases__:
            self._class(base)
        if not self._is_ours(cls.__module__):
            return
        self.texts[_name(cls)] = source_of(cls)
        for name, value in vars(cls).items():
            for function in _functions(value):
                self._function(function)
            if not name.startswith("__") and not callable(value) and not list(_functions(value)):
                self._class(type(value))

    def _function(self, function: FunctionType) -> None:
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        if not self._is_ours(function.__module__ or ""):
            return
        self.texts.setdefault(_name(function), source_of(function))
        for name in _global_names(function.__code__):
            if name in function.__globals__:
                self._follow(name, function.__globals__[name])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            if name != "__class__":
                self._follow(f"{_name(function)}.{name}", held)

    def _is_ours(self, module_name: str) -> bool:
        """Whether a module is the user's; those of hybridlab are noted."""
        top = module_name.partition(".")[0]
        if top == "hybridlab":
            self.modules.add(module_name)
        if top in ("hybridlab", "builtins") or top in sys.stdlib_module_names:
            return top == "__main__"
        path = getattr(sys.modules.get(top), "__file__", None)
        return path is None or not str(Path(path).resolve()).startswith(_INSTALLED)


def source_of(value: type | FunctionType) -> str:
    """Source text; where there is none (a class made by `exec`) the code objects stand for it."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        attributes = [value] if isinstance(value, FunctionType) else list(vars(value).values())
        return "\n".join(_code_text(f.__code__) for attribute in attributes for f in _functions(attribute))


def content(value: Any) -> str:
    """A text that is equal for equal values, whatever the process; long ones end with a digest of the whole."""
    text = _content(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}... {digest(text.encode())}"


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _content(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)} {digest(value.tobytes())}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_content(k)}: {_content(v)}" for k, v in value.items()) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_content, value))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_content, value)) + "]"
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    if isinstance(value, functools.partial):
        return f"partial {_content(value.func)} {_content(value.args)} {_content(value.keywords)}"
    if dataclasses.is_dataclass(value) or type(value).__repr__ is object.__repr__:
        return f"{_name(type(value))} {_content(dict(vars(value))) if hasattr(value, '__dict__') else ''}"
    return repr(value)


def _code_text(code: CodeType) -> str:
    constants = [_code_text(one) if isinstance(one, CodeType) else _content(one) for one in code.co_consts]
    return f"{code.co_name} {code.co_code.hex()} {' '.join(code.co_names)} {constants}"


def _name(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions in an attribute of a class: methods, properties, static and class methods."""
    if isinstance(value, property):
        value = [value.fget, value.fset, value.fdel]
    for one in value if isinstance(value, list) else [value]:
        one = getattr(one, "__func__", getattr(one, "func", one))
        one = inspect.unwrap(one) if callable(one) else one
        if isinstance(one, FunctionType):
            yield one


def _global_names(code: CodeType) -> Iterator[str]:
    """Names that a function may read from its module, in nested functions too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
