"""A workload as a table, to look at before it is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from hybridlab.errors import ConfigError
from hybridlab.sections import one_line
from hybridlab.workload.base import Row, WorkloadBase
from hybridlab.workload.kinds import WORKLOAD_KINDS, Workload
from hybridlab.workload.requests import load_rows, request_id

if TYPE_CHECKING:
    import pandas as pd


def workload_table(workload: Mapping[str, Any] | WorkloadBase, base: str | Path | None = None) -> pd.DataFrame:
    """One row per request: request_id, arrival_s, after, continues, prompt_tokens, output_tokens.

    `workload` is the section of a config, as a mapping or as `load_config(...).workload`. Lengths are what is served,
    scaled and clipped. With `after` (a request id), `arrival_s` counts from the end of that request; where `continues`
    is true too, the prompt is the new text alone. If prompts share blocks (Mooncake's hash ids, a system prompt),
    `shared_prefix_tokens` says how many tokens of a prompt are the beginning of an earlier one: what an unlimited
    prefix cache could spare at most. Relative paths start at `base` (default: the project, see hybridlab.config).
    Raises ConfigError.
    """
    import pandas as pd

    from hybridlab.config import project_dir

    section = _section(workload)
    rows = load_rows(section, project_dir() if base is None else Path(base))
    lengths = [section.lengths(row) for row in rows]
    columns = {
        "request_id": [request_id(index) for index in range(len(rows))],
        "arrival_s": [row.arrival_s for row in rows],
        "after": [None if row.after is None else request_id(row.after) for row in rows],
        "continues": [row.continues for row in rows],
        "prompt_tokens": [prompt for prompt, _ in lengths],
        "output_tokens": [output for _, output in lengths],
    }
    if any(row.blocks for row in rows):
        columns["shared_prefix_tokens"] = shared_prefix_tokens(section, rows)
    return pd.DataFrame(columns)


def shared_prefix_tokens(workload: WorkloadBase, rows: Sequence[Row]) -> list[int]:
    """Of each prompt, the tokens that an earlier one begins with too, by their blocks."""
    nodes: dict[tuple[int, int], int] = {}  # (node, block) -> node of a tree of prefixes; 0 is the root
    longest = [0]  # per node, where its block ends in the longest prompt that has it
    result = []
    for row in rows:
        length, _ = workload.lengths(row)
        node, shared = 0, 0
        for number, block in enumerate(row.blocks, start=1):
            end = min(workload.prompt_end(number * row.block_tokens), length)
            node = nodes.setdefault((node, block), len(longest))
            if node == len(longest):  # new, and so will be all that follow
                longest.append(0)
            else:
                shared = min(end, longest[node])
            longest[node] = max(longest[node], end)
            if end == length:
                break
        result.append(shared)
    return result


def _section(workload: Mapping[str, Any] | WorkloadBase) -> WorkloadBase:
    if isinstance(workload, WorkloadBase):
        return workload
    if not isinstance(workload, Mapping):
        raise ConfigError(f"workload: expected a mapping or a config's workload, got {type(workload).__name__}")
    try:
        return TypeAdapter(dict[str, Workload]).validate_python({"workload": dict(workload)})["workload"]
    except ValidationError as error:
        raise ConfigError(one_line(error, {"workload": WORKLOAD_KINDS})) from None
