"""A request as the user states it, and the record of what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from hybridlab.plans import RequestId


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedy at temperature 0, else from the smallest set of mass `top_p`.

    The draw depends on (`seed`, position) alone, never on what shares the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One prompt to serve. `arrival_s` counts from the start of the run.

    Generation ends after `max_tokens` tokens or at a token of `stop_token_ids` (which is kept in the output).

    With `after`, the request arrives `arrival_s` seconds after the request of that id has ended, however it
    ended: a user who waits for an answer before the next question (closed loop). With `continues` too, the prompt
    is appended to that request's prompt and output (a further turn of a conversation).

    A request that has not finished `timeout_s` seconds after its arrival is ended, its output so far kept; a step that
    is computing it then may still finish it.
    """

    id: RequestId
    prompt: tuple[int, ...]
    max_tokens: int
    arrival_s: float = 0.0
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: tuple[int, ...] = ()
    after: RequestId | None = None
    continues: bool = False
    timeout_s: float | None = None


class Status(StrEnum):
    """Where a request stands; the last four are final."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(eq=False)
class RequestRecord:
    """What was measured of one request; times are seconds since the start of the run.

    `prompt` is what was computed: the request's own, after the conversation that it continues. `arrival_s` is None
    until it is known, for a request that arrives after another. `token_times_s` holds when each output token was
    known to the parent, `first_scheduled_s` when a worker first computed for it. `cached_tokens` of the prompt were
    found in the KV cache at that time. `error` says why a request was rejected, failed or ran out of time.
    """

    request: Request
    status: Status = Status.QUEUED
    output: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    first_scheduled_s: float | None = None
    finished_s: float | None = None
    finish_reason: str = ""
    error: str = ""
    prompt: tuple[int, ...] = ()
    arrival_s: float | None = None
    cached_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.prompt and not self.request.continues:
            self.prompt = self.request.prompt
        if self.arrival_s is None and self.request.after is None:
            self.arrival_s = self.request.arrival_s

    @property
    def is_final(self) -> bool:
        return self.status in (Status.FINISHED, Status.CANCELLED, Status.REJECTED, Status.FAILED)
