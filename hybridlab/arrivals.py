"""When requests arrive: at a time of their own, or after another request has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush

from hybridlab.errors import RequestError
from hybridlab.plans import RequestId
from hybridlab.request import Request, RequestRecord, Status

WhyRefused = Callable[[Request, int], str]
"""Why a request can never be served behind a conversation of so many tokens; "" if it can be."""


class Arrivals:
    """The records of a run, and those of them that have not arrived yet.

    A request that can never be served is rejected at once or, where that depends on the answer to another, when
    the answer is known; it stops no other.
    """

    def __init__(self, requests: Iterable[Request], why_refused: WhyRefused) -> None:
        self._why_refused = why_refused
        self.records: dict[RequestId, RequestRecord] = {}
        for request in requests:
            if not isinstance(request.id, str):
                raise RequestError(f"request id is {request.id!r:.60}, expected a text")
            if request.id in self.records:
                raise RequestError(f"request id {request.id!r} occurs more than once")
            self.records[request.id] = RequestRecord(request)
        self._number = {rid: number for number, rid in enumerate(self.records)}
        self._followers: dict[RequestId, list[RequestRecord]] = {}
        for record in self.records.values():
            if isinstance(record.request.after, str):
                self._followers.setdefault(record.request.after, []).append(record)
        refused = self._refused()
        self._timed = [
            (record.request.arrival_s, self._number[rid], record)
            for rid, record in self.records.items()
            if record.request.after is None and rid not in refused
        ]
        heapify(self._timed)
        for rid in refused:
            self._remove(self.records[rid])
        for rid, reason in refused.items():
            self.records[rid].error = reason
            self.end(self.records[rid], Status.REJECTED, "rejected", 0.0)

    @property
    def expected(self) -> bool:
        return bool(self._timed or self._followers)

    @property
    def next_s(self) -> float | None:
        return self._timed[0][0] if self._timed else None

    def until(self, now_s: float) -> Iterator[RequestRecord]:
        """Those that have arrived at `now_s`, in the order of arrival; of equal times as they were given."""
        while self._timed and self._timed[0][0] <= now_s:
            yield heappop(self._timed)[2]

    def cancel(self, request_id: RequestId, now_s: float) -> None:
        """End a request that has not arrived yet."""
        record = self.records[request_id]
        if not record.is_final:
            self._timed = [entry for entry in self._timed if entry[2] is not record]
            heapify(self._timed)
            self._remove(record)
            self.end(record, Status.CANCELLED, "cancelled", now_s)

    def end(self, record: RequestRecord, status: Status, reason: str, now_s: float) -> None:
        """Close the record of a request; those that wait for its end arrive in their time."""
        _close(record, status, reason, now_s)
        ended = [record]
        while ended:
            leader = ended.pop()
            for follower in self._followers.pop(leader.request.id, ()):
                follower.error = self._why_not_after(follower, leader)
                if follower.error:
                    _close(follower, Status.REJECTED, "rejected", now_s)
                    ended.append(follower)
                else:
                    follower.arrival_s = now_s + follower.request.arrival_s
                    heappush(self._timed, (follower.arrival_s, self._number[follower.request.id], follower))

    def _why_not_after(self, record: RequestRecord, leader: RequestRecord) -> str:
        """Give a further turn its whole prompt; "" or why it cannot be served."""
        request = record.request
        if not request.continues:
            return ""
        if leader.status is not Status.FINISHED:
            return f"continues request {leader.request.id!r}, which was {leader.status}"
        record.prompt = (*leader.prompt, *leader.output, *request.prompt)
        return self._why_refused(request, len(record.prompt) - len(request.prompt))

    def _remove(self, record: RequestRecord) -> None:
        """A request that will not arrive waits for nobody."""
        leader = record.request.after
        waiting = self._followers.get(leader, []) if isinstance(leader, str) else []
        if record in waiting:
            waiting.remove(record)
        if isinstance(leader, str) and leader in self._followers and not waiting:
            del self._followers[leader]

    def _refused(self) -> dict[RequestId, str]:
        """Why requests can never be served, as far as is known before the run."""
        refused: dict[RequestId, str] = {}
        least_tokens: dict[RequestId, int] = {}  # of prompt and answer: of earlier turns at least one token was drawn
        reached = deque(record for record in self.records.values() if not isinstance(record.request.after, str))
        while reached:
            request = reached.popleft().request
            follows = request.continues and isinstance(request.after, str)
            before = least_tokens[request.after] if follows else 0  # pyright: ignore[reportArgumentType]
            reason = self._why_refused(request, before)
            if request.continues and request.after is None:
                reason = "continues is set, but after names no request"
            if reason:
                refused[request.id] = reason
            least_tokens[request.id] = 0 if reason else before + len(request.prompt) + 1
            reached.extend(self._followers.get(request.id, ()))
        for rid, record in self.records.items():
            if rid not in least_tokens:
                after = record.request.after
                lost = "waits for itself in the end" if after in self.records else "is not among the requests"
                refused[rid] = f"after names {after!r}, which {lost}"
        return refused


def _close(record: RequestRecord, status: Status, reason: str, now_s: float) -> None:
    record.status, record.finish_reason, record.finished_s = status, reason, now_s
