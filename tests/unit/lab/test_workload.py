from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from hybridlab.errors import ConfigError
from hybridlab.workload import Workload, make_requests, warmup_requests

SLICE = Path(__file__).resolve().parents[3] / "experiments" / "data" / "azure_2023_code_slice.csv"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def workload(**keys: Any) -> Any:
    return TypeAdapter(Workload).validate_python(keys)


def azure(path: Path, **keys: Any) -> Any:
    return workload(kind="azure", path=str(path), **{"num_requests": 2, **keys})


def test_azure_slice() -> None:
    requests = make_requests(azure(SLICE, num_requests=200), vocab=50)
    assert len(requests) == 200
    assert requests[0].arrival_s == 0.0
    assert requests[-1].arrival_s == pytest.approx(26.03, abs=0.01)
    assert (len(requests[0].prompt), requests[0].max_tokens) == (1336, 12)
    assert [r.id for r in requests[:2]] == ["r00000", "r00001"]
    assert all(0 <= token < 50 for token in requests[0].prompt)
    assert requests[0].stop_token_ids == ()


def test_time_and_length_scaling_and_clipping() -> None:
    plain = make_requests(azure(SLICE, num_requests=50, start=10), vocab=50)
    scaled = make_requests(
        azure(
            SLICE,
            num_requests=50,
            start=10,
            rate_scale=4.0,
            length_scale=10.0,
            max_prompt_tokens=300,
            max_output_tokens=2,
        ),
        vocab=50,
    )
    for before, after in zip(plain, scaled, strict=True):
        assert after.arrival_s == pytest.approx(before.arrival_s / 4)
        assert len(after.prompt) == min(300, -(-len(before.prompt) // 10))
        assert after.max_tokens == min(2, -(-before.max_tokens // 10))
    assert plain[0].arrival_s == 0.0


def test_output_lengths_may_keep_their_own_scale() -> None:
    keys: dict[str, Any] = {"kind": "offline", "num_requests": 1, "prompt_tokens": 80, "output_tokens": 80}
    (both,) = make_requests(workload(**keys, length_scale=8.0), vocab=9)
    (own,) = make_requests(workload(**keys, length_scale=8.0, output_length_scale=2.0), vocab=9)
    assert (len(both.prompt), both.max_tokens) == (10, 10)
    assert (len(own.prompt), own.max_tokens) == (10, 40)


def test_tokens_depend_on_seed_and_index_alone() -> None:
    keys: dict[str, Any] = {"kind": "offline", "prompt_tokens": 8, "output_tokens": 4}
    many = make_requests(workload(num_requests=5, **keys), vocab=1000)
    few = make_requests(workload(num_requests=2, **keys), vocab=1000)
    other = make_requests(workload(num_requests=5, seed=1, **keys), vocab=1000)
    assert [r.prompt for r in many[:2]] == [r.prompt for r in few]
    assert [r.sampling.seed for r in many[:2]] == [r.sampling.seed for r in few]
    assert all(a.prompt != b.prompt for a, b in zip(many, other, strict=True))
    assert len({r.prompt for r in many}) == 5
    assert all(r.arrival_s == 0.0 for r in many)


def test_poisson_rate() -> None:
    made = make_requests(
        workload(kind="poisson", num_requests=4000, rate_req_s=8.0, prompt_tokens=[2, 5], output_tokens=1),
        vocab=9,
    )
    assert made[-1].arrival_s == pytest.approx(4000 / 8.0, rel=0.06)
    assert {len(r.prompt) for r in made} == {2, 3, 4, 5}
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(made))


def test_sampling_reaches_the_requests() -> None:
    keys: dict[str, Any] = {"kind": "offline", "num_requests": 2, "prompt_tokens": 1, "output_tokens": 1}
    made = make_requests(workload(**keys, sampling={"temperature": 0.7, "top_p": 0.9}), vocab=9)
    assert (made[0].sampling.temperature, made[0].sampling.top_p) == (0.7, 0.9)
    assert made[0].sampling.seed != made[1].sampling.seed


def test_warmup_shares_lengths_but_not_tokens() -> None:
    requests = make_requests(azure(SLICE), vocab=1000)
    warm = warmup_requests(requests, 3, vocab=1000)
    assert [len(r.prompt) for r in warm] == [len(requests[i % 2].prompt) for i in range(3)]
    assert warm[0].prompt != requests[0].prompt
    assert not {r.id for r in warm} & {r.id for r in requests}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "TIMESTAMP,ContextTokens\n2023-11-16 18:35:01.1,3\n",
            "no column 'GeneratedTokens'; expected TIMESTAMP",
        ),
        ("", "no column 'TIMESTAMP'"),
        (HEADER + "2023-11-16 18:35:01.1,3,4\n", "1 rows; workload.start + num_requests asks for 2"),
        (HEADER, "no row 0"),
        (HEADER + "yesterday,3,4\n", "line 2: TIMESTAMP 'yesterday': expected YYYY-MM-DD HH:MM:SS"),
        (
            HEADER + "2023-11-16 18:35:01,-3,4\n",
            "line 2: ContextTokens '-3': expected a positive whole number",
        ),
        (HEADER + "2023-11-16 18:35:01,3,\n", "line 2: GeneratedTokens ''"),
        (HEADER + "2023-11-16 18:35:01\n", "line 2: ContextTokens ''"),
        (HEADER + "2023-11-16 18:35:01,3,4\n2023-11-16 18:35:00,3,4\n", "line 3: TIMESTAMP goes back"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        make_requests(azure(path), vocab=9)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_missing_and_binary_traces(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"workload\.path: .*none\.csv: cannot be read"):
        make_requests(azure(Path("none.csv")), vocab=9, base=tmp_path)
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="line 1: not UTF-8 text"):
        make_requests(azure(tmp_path / "b.csv"), vocab=9)


@settings(max_examples=50, deadline=None)
@given(
    low=st.integers(1, 50),
    extra=st.integers(0, 50),
    scale=st.floats(0.1, 100),
    limit=st.none() | st.integers(1, 40),
)
def test_lengths_stay_in_bounds(low: int, extra: int, scale: float, limit: int | None) -> None:
    made = make_requests(
        workload(
            kind="offline",
            num_requests=5,
            prompt_tokens=[low, low + extra],
            output_tokens=low,
            length_scale=scale,
            max_prompt_tokens=limit,
        ),
        vocab=7,
    )
    for request in made:
        assert 1 <= len(request.prompt) <= (limit or 10**9)
        assert request.max_tokens >= 1
