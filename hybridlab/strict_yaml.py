"""YAML without its traps: no duplicate keys, aliases, merges, NaN or infinity, and no file over 1 MB."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridlab.errors import ConfigError

MAX_BYTES = 1_000_000


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file. Raises ConfigError naming file, line and what was expected."""
    import yaml

    path = Path(path)
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: expected a YAML file, found a folder")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); expected a YAML file") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes; expected a small YAML file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    try:
        data = yaml.load(text, Loader=_strict_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_describe(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except (ValueError, OverflowError) as error:  # e.g. the date 2023-99-99
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level, found {type(data).__name__}")
    return data


def refuse_nonfinite(value: Any, key: str = "") -> None:
    """Raise ConfigError naming the key path of the first NaN or infinity in nested dicts and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: expected a finite number, got {value}")
    if isinstance(value, Mapping):
        for name, item in value.items():
            refuse_nonfinite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            refuse_nonfinite(item, f"{key}.{index}")


def _describe(error: Any) -> str:
    problem = getattr(error, "problem", None) or "not valid YAML"
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {problem}" if mark else str(problem)


def _strict_loader() -> Any:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if getattr(event, "anchor", None) is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, "anchors and aliases are not allowed; write the value out", event.start_mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag != "tag:yaml.org,2002:str":
                    raise yaml.constructor.ConstructorError(
                        None, None, f"expected a text key, got {key_node.value!r}", key_node.start_mark
                    )
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key {key_node.value!r}", key_node.start_mark
                    )
                seen.add(key_node.value)
            return super().construct_mapping(node, deep)

        def flatten_mapping(self, node: Any) -> None:
            """Merge keys stay ordinary keys, and are then refused as such."""

    return StrictLoader
