from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from hybridlab.errors import ConfigError
from hybridlab.workload import Workload, load_rows, make_requests

SLICE = Path(__file__).resolve().parents[3] / "experiments" / "data" / "azure_2023_code_slice.csv"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def azure(path: Path = SLICE, **keys: Any) -> Any:
    keys = {"kind": "azure", "path": str(path), "num_requests": 2, **keys}
    return TypeAdapter(Workload).validate_python(keys)


def test_slice() -> None:
    requests = make_requests(azure(num_requests=200), vocab=50)
    assert len(requests) == 200
    assert requests[0].arrival_s == 0.0
    assert requests[-1].arrival_s == pytest.approx(26.03, abs=0.01)
    assert (len(requests[0].prompt), requests[0].max_tokens) == (1336, 12)


def test_time_and_length_scaling_and_clipping() -> None:
    plain = make_requests(azure(num_requests=50, start=10), vocab=50)
    keys = {"rate_scale": 4.0, "length_scale": 10.0, "max_prompt_tokens": 300, "max_output_tokens": 2}
    scaled = make_requests(azure(num_requests=50, start=10, **keys), vocab=50)
    for before, after in zip(plain, scaled, strict=True):
        assert after.arrival_s == pytest.approx(before.arrival_s / 4)
        assert len(after.prompt) == min(300, -(-len(before.prompt) // 10))
        assert after.max_tokens == min(2, -(-before.max_tokens // 10))
    assert plain[0].arrival_s == 0.0


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 150), num_requests=st.integers(2, 50), rate=st.floats(0.01, 1000))
def test_rate_req_s_is_the_mean_offered_load(start: int, num_requests: int, rate: float) -> None:
    rows = load_rows(azure(start=start, num_requests=num_requests, rate_req_s=rate), Path())
    assert (num_requests - 1) / (rows[-1].arrival_s - rows[0].arrival_s) == pytest.approx(rate, rel=1e-9)
    plain = load_rows(azure(start=start, num_requests=num_requests), Path())
    factor = plain[-1].arrival_s / rows[-1].arrival_s
    for one, two in zip(plain, rows, strict=True):
        assert one.arrival_s == pytest.approx(two.arrival_s * factor)
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(rows))


def test_one_request_has_no_rate() -> None:
    (row,) = load_rows(azure(num_requests=1, rate_req_s=3.0), Path())
    assert row.arrival_s == 0.0


def test_rate_scale_and_rate_req_s_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="expected either 'rate_scale' or 'rate_req_s', got both"):
        azure(rate_scale=2.0, rate_req_s=3.0)


def test_equal_arrivals_cannot_be_scaled_to_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "2023-11-16 18:35:01,3,4\n" * 2)
    with pytest.raises(ConfigError, match=r"workload\.rate_req_s: all 2 requests of .*trace\.csv arrive at the same"):
        load_rows(azure(path, rate_req_s=1.0), Path())
    assert [row.arrival_s for row in load_rows(azure(path), Path())] == [0.0, 0.0]


def test_time_stamps_of_2024_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lines = "2024-05-10 00:00:00.009930+00:00,3,4\n2024-05-10 00:00:02+00:00,5,6\n2024-05-10 00:00:02.5,7,8\n"
    path.write_text("\ufeff" + HEADER + lines, encoding="utf-8")
    rows = load_rows(azure(path, num_requests=3), Path())
    assert [row.arrival_s for row in rows] == pytest.approx([0.0, 1.99007, 2.49007], abs=1e-6)
    assert [(row.prompt_tokens, row.output_tokens) for row in rows] == [(3, 4), (5, 6), (7, 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:35:01.1,3\n", "no column 'GeneratedTokens'; expected TIMESTAMP"),
        ("", "no column 'TIMESTAMP'"),
        (HEADER + "2023-11-16 18:35:01.1,3,4\n", "1 rows; workload.start + num_requests asks for 2"),
        (HEADER, "no row 0; workload.start + num_requests asks for 2 rows"),
        (HEADER + "yesterday,3,4\n", "line 2: TIMESTAMP 'yesterday': expected YYYY-MM-DD HH:MM:SS"),
        (HEADER + "2023-11-16 18:35:01+02:00,3,4\n", "line 2: TIMESTAMP '2023-11-16 18:35:01+02:00': expected YYYY"),
        (HEADER + "2023-11-16 18:35:01,-3,4\n", "line 2: ContextTokens '-3': expected a positive whole number"),
        (HEADER + "2023-11-16 18:35:01,nan,4\n", "line 2: ContextTokens 'nan': expected a positive whole number"),
        (HEADER + "2023-11-16 18:35:01,3,²\n", "line 2: GeneratedTokens '²': expected a positive whole number"),
        (HEADER + "2023-11-16 18:35:01,3,\n", "line 2: GeneratedTokens ''"),
        (HEADER + "2023-11-16 18:35:01\n", "line 2: ContextTokens ''"),
        (HEADER + f"2023-11-16 18:35:01,{10**12},4\n", "'1000000000000': expected at most 10,000,000 tokens"),
        (HEADER + f"2023-11-16 18:35:01,{'9' * 5000},4\n", "line 2: ContextTokens '9999"),
        (HEADER + "2023-11-16 18:35:01,3,4\n2023-11-16 18:35:00,3,4\n", "line 3: TIMESTAMP goes back"),
        (HEADER + f'2023-11-16 18:35:01,"{"3" * 200_000}",4\n', "line 2: not CSV (field larger than field limit"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        make_requests(azure(path), vocab=9)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200
