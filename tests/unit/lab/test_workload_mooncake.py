from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from hybridlab.errors import ConfigError
from hybridlab.workload import Workload, load_rows, make_requests, workload_table

SLICE = Path(__file__).resolve().parents[3] / "experiments" / "data" / "mooncake_conversation_slice.jsonl"
LINE = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}\n'
LARGE_VOCAB = 2**31  # so large that different blocks do not begin alike by chance


def mooncake(path: Path = SLICE, **keys: Any) -> Any:
    keys = {"kind": "mooncake", "path": str(path), "num_requests": 2, **keys}
    return TypeAdapter(Workload).validate_python(keys)


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_slice() -> None:
    lines = [json.loads(line) for line in SLICE.read_text().splitlines()]
    rows = load_rows(mooncake(num_requests=496), Path())
    assert len(lines) == len(rows) == 496
    for line, row in zip(lines, rows, strict=True):
        assert (row.prompt_tokens, row.output_tokens) == (line["input_length"], line["output_length"])
        assert row.blocks == tuple(line["hash_ids"])
    grid = load_rows(mooncake(num_requests=496, spread_s=0.0), Path())
    assert [row.arrival_s for row in grid] == pytest.approx([(n["timestamp"] - 374_999) / 1000 for n in lines])
    with pytest.raises(ConfigError, match=r"496 rows; workload\.start"):
        load_rows(mooncake(num_requests=497), Path())


def test_arrivals_are_spread_inside_their_bin() -> None:
    grid = load_rows(mooncake(num_requests=496, spread_s=0.0), Path())
    spread = load_rows(mooncake(num_requests=496), Path())
    origin = spread[0].arrival_s - grid[0].arrival_s  # both count from their first arrival
    offsets = np.array([two.arrival_s - one.arrival_s - origin for one, two in zip(grid, spread, strict=True)])
    first_offset = -offsets.min()
    assert 0 < first_offset + offsets.max() < 3.0
    assert np.mean(offsets + first_offset) == pytest.approx(1.5, abs=0.15)
    gaps = np.diff([row.arrival_s for row in spread])
    assert (gaps >= 0).all() and gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.15)  # as random as Poisson
    assert load_rows(mooncake(num_requests=496, seed=1), Path()) != spread
    assert [a._replace(arrival_s=0.0) for a in grid] == [b._replace(arrival_s=0.0) for b in spread]


def test_no_arrival_passes_the_next_time_stamp(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [LINE.replace('"timestamp": 0', f'"timestamp": {ms}') for ms in (0, 0, 100, 100, 2900)]
    path.write_text("".join(lines))
    for seed in range(20):
        times = [row.arrival_s for row in load_rows(mooncake(path, num_requests=5, seed=seed), Path())]
        assert times == sorted(times) and times[1] <= 0.1 and times[3] <= 2.9 and times[4] <= 5.9


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 400), rate=st.floats(0.01, 100))
def test_rate_req_s_is_the_mean_offered_load(start: int, rate: float) -> None:
    rows = load_rows(mooncake(start=start, num_requests=50, rate_req_s=rate), Path())
    assert 49 / (rows[-1].arrival_s - rows[0].arrival_s) == pytest.approx(rate, rel=1e-9)


def test_equal_hash_ids_are_equal_tokens_wherever_they_occur() -> None:
    early = make_requests(mooncake(num_requests=20), LARGE_VOCAB)
    late = make_requests(mooncake(num_requests=10, start=10), LARGE_VOCAB)
    assert [r.prompt for r in early[10:]] == [r.prompt for r in late]  # whole blocks cover the whole prompt
    assert common(early[0].prompt, early[1].prompt) == 512
    other_seed = make_requests(mooncake(num_requests=1, seed=1), LARGE_VOCAB)
    assert common(early[0].prompt, other_seed[0].prompt) == 0


chains = st.lists(st.integers(0, 2), min_size=1, max_size=5)
prompts = st.lists(st.tuples(chains, st.integers(1, 8)), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    drawn=prompts,
    scale=st.sampled_from([1.0, 2.0, 3.0, 7.3, 0.5, 100.0]),
    limit=st.none() | st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_common_prefixes_are_what_hash_ids_say(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Any], scale: float, limit: int | None, seed: int
) -> None:
    """Blocks of 8 tokens, ids of chains of choices as in the real trace, last blocks of 1 to 8 tokens."""
    path = tmp_path_factory.mktemp("mooncake") / "trace.jsonl"
    ids = [[int("1" + "".join(map(str, chain[: i + 1]))) for i in range(len(chain))] for chain, _ in drawn]
    lengths = [8 * (len(chain) - 1) + last for chain, last in drawn]
    lines = [
        {"timestamp": 0, "input_length": n, "output_length": 3, "hash_ids": h}
        for n, h in zip(lengths, ids, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys: dict[str, Any] = {"num_requests": len(drawn), "block_tokens": 8, "length_scale": scale, "seed": seed}
    section = mooncake(path, **keys, max_prompt_tokens=limit)
    made = [request.prompt for request in make_requests(section, LARGE_VOCAB)]
    ends = [min(max(1, int(np.ceil(n / scale))), limit or 10**9) for n in lengths]
    assert [len(prompt) for prompt in made] == ends
    expected = [0] * len(made)
    for (i, a), (j, b) in itertools.combinations(enumerate(ids), 2):
        equal = sum(x == y for x, y in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        shared = min(ends[i], ends[j], int(np.ceil(8 * equal / scale)))
        assert common(made[i], made[j]) == shared
        expected[j] = max(expected[j], shared)
    table = workload_table(section)
    assert table["shared_prefix_tokens"].tolist() == expected


def test_table_says_how_much_of_the_slice_may_be_reused() -> None:
    table = workload_table(mooncake(num_requests=496))
    share = sum(table["shared_prefix_tokens"].tolist()) / sum(table["prompt_tokens"].tolist())
    assert share == pytest.approx(0.2051, abs=1e-4)  # as the README of the data says
    scaled = workload_table(mooncake(num_requests=496, length_scale=64.0))
    scaled_share = sum(scaled["shared_prefix_tokens"].tolist()) / sum(scaled["prompt_tokens"].tolist())
    assert scaled_share == pytest.approx(share, rel=0.01)


def test_gzip_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(("\n" + LINE + "  \n" + LINE).encode()))
    assert [row.prompt_tokens for row in load_rows(mooncake(path), Path())] == [600, 600]


def changed(**values: Any) -> str:
    return json.dumps({**json.loads(LINE), **values}) + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops\n", "line 2: not JSON (Expecting property name"),
        ("[1, 2]\n", "line 2: expected a JSON object, got [1, 2]"),
        ("3\n", "line 2: expected a JSON object, got 3"),
        ("[" * 100_000 + "\n", "line 2: not JSON ("),
        ("1" * 5000 + "\n", "line 2: not JSON ("),
        (
            LINE.replace("output", "out"),
            "line 2: no key 'output_length'; expected timestamp, input_length, output_length",
        ),
        (LINE.replace('"timestamp": 0', '"timestamp": NaN'), "line 2: not JSON (NaN is no number)"),
        (changed(timestamp="0"), "line 2: timestamp '0': expected a number, got text"),
        (changed(timestamp=-1), "line 2: timestamp -1: expected a number >= 0"),
        (changed(timestamp=True), "line 2: timestamp True: expected a number >= 0"),
        (changed(timestamp=None), "line 2: timestamp None: expected a number >= 0"),
        (changed(timestamp=10**400), "line 2: timestamp 1000"),
        (changed(input_length="600"), "line 2: input_length '600': expected a number, got text"),
        (changed(input_length=-5), "line 2: input_length -5: expected a positive whole number"),
        (changed(input_length=600.5), "line 2: input_length 600.5: expected a positive whole number"),
        (changed(input_length=True), "line 2: input_length True: expected a positive whole number"),
        (changed(input_length=10**12), "line 2: input_length 1000000000000: expected at most 10,000,000 tokens"),
        (changed(output_length=0), "line 2: output_length 0: expected a positive whole number"),
        (changed(hash_ids=[7]), "line 2: 1 hash_ids; input_length 600 has 2 blocks of 512 tokens"),
        (changed(hash_ids=[7, 8, 9]), "line 2: 3 hash_ids; input_length 600 has 2 blocks of 512 tokens"),
        (changed(hash_ids=[7, -8]), "line 2: hash_ids [7, -8]: expected a list of whole numbers"),
        (changed(hash_ids=[7, "8"]), "line 2: hash_ids [7, '8']: expected a list of whole numbers"),
        (changed(hash_ids=[7, 2**64]), "line 2: hash_ids [7, 18446744073709551616]: expected a list of whole numbers"),
        (changed(hash_ids=None), "line 2: hash_ids None: expected a list of whole numbers"),
        ("", "1 rows; workload.start + num_requests asks for 2"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(LINE + line)
    with pytest.raises(ConfigError) as caught:
        load_rows(mooncake(path), Path())
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200


def test_time_that_goes_back_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(changed(timestamp=5) + LINE)
    with pytest.raises(ConfigError, match="line 2: timestamp goes back; expected arrival order"):
        load_rows(mooncake(path), Path())
