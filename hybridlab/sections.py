"""The base of every config section, and one-line errors with a did-you-mean."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the closest of `known`, else "; expected one of ..."."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(sorted(known))}"


def _path(text: str) -> str:
    try:
        named = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise ValueError(f"expected a path, got {text!r:.60}")
    return text


PathText = Annotated[str, AfterValidator(_path)]
"""Text that the system could have a file under."""


class Section(BaseModel):
    """Frozen, strict (numbers written as text are refused), no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        # pydantic's own message does not say which key was probably meant.
        if not isinstance(data, Mapping):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for key in data:
            if key not in known:
                raise PydanticCustomError(
                    "unknown_key",
                    "unknown key {key}{hint}",
                    {"key": repr(key), "hint": did_you_mean(str(key), known)},
                )
        return dict(data)


def one_line(error: ValidationError, tags: Mapping[str, Iterable[str]] | None = None) -> str:
    """The first problem of a pydantic error as "key.path: what was expected, got value (and n more)".

    `tags` names, per top-level key, the union tags that pydantic puts into its locations.
    """
    problems = error.errors()
    first = problems[0]
    loc = [str(part) for part in first["loc"] if not str(part).startswith("function-")]
    if tags and len(loc) > 1 and loc[1] in tags.get(loc[0], ()):
        del loc[1]
    text = _expected(first)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{'.'.join(loc)}: {text}{more}" if loc else f"{text}{more}"


def _expected(problem: Any) -> str:
    kind, message, given = problem["type"], problem["msg"], problem.get("input")
    if kind == "unknown_key":
        return message
    if kind == "missing":
        return "missing; this key is required"
    if kind == "union_tag_not_found":
        return "missing key 'kind'; this section comes in kinds"
    if kind == "union_tag_invalid":
        tag = problem["ctx"]["tag"]
        return f"unknown kind {tag!r}" + did_you_mean(tag, _tags(problem).split(", "))
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind in ("model_type", "model_attributes_type"):
        return f"expected a mapping, got {_show(given)}"
    message = message[0].lower() + message[1:]
    message = message.replace("input should be ", "expected ", 1).replace("valid dictionary", "mapping")
    if problem.get("ctx", {}).keys() & {"gt", "ge", "lt", "le"}:
        message = message.replace("expected ", "expected a number ", 1)
    return f"{message}, got {_show(given)}{_text_hint(kind, given)}"


def _tags(problem: Any) -> str:
    return problem["ctx"]["expected_tags"].replace("'", "")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text_hint(kind: str, given: Any) -> str:
    if kind in ("float_type", "int_type") and isinstance(given, str):
        try:
            number = float(given)
        except ValueError:
            return ""
        # YAML 1.1 reads 1e3 as text: without this hint the message would look absurd.
        return f" (text; write {number!r})" if math.isfinite(number) else " (text)"
    return ""
