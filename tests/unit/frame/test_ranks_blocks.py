"""Which KV blocks other ranks lack: whatever runs where, a step of all ranks reads nothing that they do not have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybridlab.batch import Entry
from hybridlab.engine.ranks_blocks import LoneBlocks
from hybridlab.request import Sampling

SIZE, BLOCKS = 4, 6


def entry(name: str, start: int, count: int, table: tuple[int, ...]) -> Entry:
    return Entry(name, [0] * count, start, table, Sampling(), wants_token=True)


@given(st.data())
def test_all_ranks_have_what_a_step_of_all_reads(data):
    """Requests come, grow, share each other's full blocks and go; caches hold numbers that name what was written."""
    first, others = ([[None] * SIZE for _ in range(BLOCKS)] for _ in range(2))
    lone, requests, written = LoneBlocks(SIZE), dict[str, tuple[list[int], int]](), 0
    for number in range(data.draw(st.integers(1, 25))):
        used = {block for table, _ in requests.values() for block in table}
        match data.draw(st.sampled_from(["start", "share", "end", "step", "step", "step"])):
            case "start":
                requests[f"r{number}"] = [], 0
            case "share" if requests:
                table, computed = requests[data.draw(st.sampled_from(sorted(requests)))]
                full = computed // SIZE
                requests[f"r{number}"] = table[:full], full * SIZE
            case "end" if requests:
                del requests[data.draw(st.sampled_from(sorted(requests)))]
            case "step" if requests:
                chosen = data.draw(st.lists(st.sampled_from(sorted(requests)), min_size=1, max_size=2, unique=True))
                entries = []
                for name in chosen:
                    table, start = requests[name]
                    count = data.draw(st.integers(1, 5))
                    while len(table) * SIZE < start + count and (free := set(range(BLOCKS)) - used):
                        table = [*table, data.draw(st.sampled_from(sorted(free)))]
                        used.add(table[-1])
                    if count := min(count, len(table) * SIZE - start):
                        entries.append(entry(name, start, count, tuple(table)))
                        requests[name] = table, start + count
                alone = data.draw(st.booleans())
                if not alone:
                    lacking = lone.lacking(entries)
                    for block in lacking:
                        others[block] = list(first[block])
                    lone.given(lacking)
                    assert lone.lacking(entries) == []
                lone.written(entries, alone=alone)
                for each in entries:
                    if not alone:
                        places = [(each.block_table[at // SIZE], at % SIZE) for at in range(each.start)]
                        assert all(first[block][at] == others[block][at] is not None for block, at in places)
                    for at in range(each.start, each.context_tokens):
                        written += 1
                        block = each.block_table[at // SIZE]
                        for cache in (first,) if alone else (first, others):
                            cache[block][at % SIZE] = written


def test_only_what_is_read_is_given_and_once():
    lone = LoneBlocks(SIZE)
    lone.written([entry("a", 0, 9, (0, 1, 2)), entry("b", 0, 4, (3,))], alone=True)
    assert lone.lacking([entry("c", 0, 5, (4, 5))]) == []
    assert lone.lacking([entry("a", 9, 1, (0, 1, 2))]) == [0, 1, 2]
    lone.given([0, 1, 2])
    assert lone.lacking([entry("a", 9, 1, (0, 1, 2)), entry("b", 4, 1, (3, 4))]) == [3]
    # A block that all write from its beginning is no longer lacking.
    lone.written([entry("d", 0, 4, (3,))], alone=False)
    assert lone.lacking([entry("b", 4, 1, (3, 4))]) == []
