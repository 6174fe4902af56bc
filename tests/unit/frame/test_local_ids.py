"""Places of experts in their group, and counts of routes, against a loop."""

from __future__ import annotations

import random

import torch

from hybridlab.engine import local_ids
from hybridlab.engine.local_ids import LocalIds, count_ids


def test_places_are_those_in_the_group_and_skipped_routes_stay_skipped():
    local = LocalIds(9, "cpu")
    ids = torch.tensor([[0, 3, -1], [8, 4, 3]], dtype=torch.int32)
    for group in ((3, 0, 8), (0, 3, 8), (), (4,), tuple(range(9))):
        place = {expert: i for i, expert in enumerate(group)}
        assert local(ids, group).tolist() == [[place.get(e, -1) for e in row] for row in ids.tolist()]


def test_the_tables_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(local_ids, "_KEPT_TABLES", 2)
    local, ids = LocalIds(4, "cpu"), torch.tensor([[0, 1]])
    for group in ((0,), (1,), (0,), (2,), (0,)):
        local(ids, group)
    assert list(local._tables) == [(2,), (0,)]
    assert local(ids, (1,)).tolist() == [[-1, 0]]


def test_counts_equal_a_loop_over_the_routes():
    rng = random.Random(0)
    for num_experts, rows in ((1, 3), (8, 50), (128, 7), (5, 0)):
        ids = [[rng.randint(-1, num_experts - 1) for _ in range(4)] for _ in range(rows)]
        expected = [sum(row.count(e) for row in ids) for e in (*range(num_experts), -1)]
        found = count_ids(torch.tensor(ids, dtype=torch.int32).view(rows, 4), num_experts)
        assert found.dtype == torch.int64 and found.tolist() == expected
