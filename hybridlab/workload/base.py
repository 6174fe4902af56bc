"""What all workloads share: their keys, their rows, and how lengths are scaled and clipped."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from hybridlab.errors import ConfigError
from hybridlab.sections import Section

MAX_TOKENS = 10_000_000
"""Most tokens of one prompt or output; a larger number in a trace is taken for a mistake."""

MOST_SCALED_TOKENS = 10**12
"""Where lengths divided by a tiny scale are cut, before any limit is looked at: they may be beyond all floats."""


def _range(value: Any) -> Any:
    pair = (value, value) if isinstance(value, int) else value
    whole = isinstance(pair, list | tuple) and all(type(n) is int for n in pair)
    if not whole or len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"expected a positive number of tokens or [low, high] with 1 <= low <= high, got {value!r}")
    if pair[1] > MAX_TOKENS:
        raise ValueError(f"expected at most {MAX_TOKENS:,} tokens, got {value!r}")
    return tuple(pair)


Count = Annotated[int, Field(gt=0)]
Lengths = Annotated[tuple[int, int], BeforeValidator(_range)]
"""Tokens: one number for all requests, or [low, high] for uniform lengths, both ends included."""


class Row(NamedTuple):
    """One request before its lengths are scaled and clipped.

    With `after` (the index of another row) it arrives `arrival_s` seconds after that request has ended; with
    `continues` too it is a further turn of that conversation, and `prompt_tokens` counts the new text alone.

    The prompt begins with `blocks` of `block_tokens` tokens each (the last one may be cut by the end of the
    prompt): equal ids stand for equal tokens. What follows them belongs to this request alone.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    after: int | None = None
    continues: bool = False
    blocks: tuple[int, ...] = ()
    block_tokens: int = 1


class SamplingConfig(Section):
    """How output tokens are drawn; greedy by default. Request seeds follow from the workload's."""

    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


class WorkloadBase(Section, ABC):
    """Keys of every workload. A kind of its own has `kind`, `num_requests` and `rows`.

    Lengths are first divided by `length_scale` (outputs by `output_length_scale` if given) and rounded up, so
    that a small machine can serve a trace, then clipped at `max_prompt_tokens` and `max_output_tokens`. No
    stop tokens are set, so an output is shorter only if the model draws its own eos token. A request that has
    not finished `timeout_s` after its arrival is ended.
    """

    length_scale: float = Field(default=1.0, gt=0)
    output_length_scale: float | None = Field(default=None, gt=0)
    max_prompt_tokens: Count | None = None
    max_output_tokens: Count | None = None
    timeout_s: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    sampling: SamplingConfig = SamplingConfig()

    @abstractmethod
    def rows(self, base: Path) -> list[Row]:
        """The requests, `num_requests` of them; relative paths start at `base`. Raises ConfigError."""

    def content_hash(self, base: Path) -> str | None:
        """Hash of the files that the rows are read from; None if there are none."""
        return None

    def prompt_end(self, tokens: int) -> int:
        """Where the first `tokens` of a prompt of the trace end in the prompt that is served."""
        end = _scaled(tokens, self.length_scale)
        return min(end, self.max_prompt_tokens) if self.max_prompt_tokens else end

    def lengths(self, row: Row) -> tuple[int, int]:
        """Prompt and output tokens of the request that is served. Raises ConfigError beyond MAX_TOKENS."""
        scale = self.output_length_scale or self.length_scale
        output = _scaled(row.output_tokens, scale)
        output = min(output, self.max_output_tokens) if self.max_output_tokens else output
        prompt = self.prompt_end(row.prompt_tokens)
        if max(prompt, output) > MAX_TOKENS:
            name = "length_scale" if prompt > MAX_TOKENS or not self.output_length_scale else "output_length_scale"
            count = max(prompt, output)
            shown = f"{count:,}" if count < MOST_SCALED_TOKENS else f"{MOST_SCALED_TOKENS:,} or more"
            raise ConfigError(f"workload.{name}: makes a request of {shown} tokens; expected at most {MAX_TOKENS:,}")
        return prompt, output


def _scaled(tokens: int, scale: float) -> int:
    return max(1, math.ceil(min(tokens / scale, MOST_SCALED_TOKENS)))


class CountedWorkload(WorkloadBase):
    """A workload whose number of requests is chosen."""

    num_requests: int = Field(gt=0, le=1_000_000)
