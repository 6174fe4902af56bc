from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from hybridlab.errors import ConfigError
from hybridlab.workload import Workload, load_rows, make_requests, workload_table

SHORT: dict[str, Any] = {"prompt_tokens": [2, 5], "output_tokens": 1}


def section(**keys: Any) -> Any:
    return TypeAdapter(Workload).validate_python({**SHORT, **keys})


def gaps_s(**keys: Any) -> np.ndarray:
    """Every gap, the one before the first request too."""
    arrivals_s = [row.arrival_s for row in load_rows(section(**keys), Path())]
    return np.diff([0.0, *arrivals_s])


def test_offline_is_there_at_once() -> None:
    rows = load_rows(section(kind="offline", num_requests=100), Path())
    assert {row.arrival_s for row in rows} == {0.0}
    assert {row.prompt_tokens for row in rows} == {2, 3, 4, 5}


def test_poisson_rate_and_memorylessness() -> None:
    gaps = gaps_s(kind="poisson", num_requests=4000, rate_req_s=8.0)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 8.0, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.06)


def test_poisson_lengths_are_uniform_and_keep_their_ends() -> None:
    rows = load_rows(section(kind="poisson", num_requests=4000, rate_req_s=8.0), Path())
    counts = np.bincount([row.prompt_tokens for row in rows], minlength=6)
    assert counts[:2].tolist() == [0, 0] and (abs(counts[2:] - 1000) < 150).all()


@pytest.mark.parametrize("cv", [0.1, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_gamma_rate_and_cv(cv: float, rate: float) -> None:
    gaps = gaps_s(kind="gamma", num_requests=20_000, rate_req_s=rate, cv=cv, seed=3)
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03 + 0.02 * cv)  # standard error cv / sqrt(n) = 0.007 cv
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_gamma_of_cv_1_is_poisson() -> None:
    gaps = np.sort(gaps_s(kind="gamma", num_requests=20_000, rate_req_s=1.0, cv=1.0))
    expected = -np.log1p(-(np.arange(20_000) + 0.5) / 20_000)  # quantiles of the exponential distribution
    assert np.abs(gaps - expected)[:19_000].max() < 0.12


@settings(max_examples=50, deadline=None)
@given(num_users=st.integers(1, 9), num_requests=st.integers(1, 40), think_s=st.floats(0, 100))
def test_closed_loop_is_a_chain_per_user(num_users: int, num_requests: int, think_s: float) -> None:
    keys: dict[str, Any] = {"kind": "closed_loop", "num_users": num_users, "num_requests": num_requests}
    made = make_requests(section(**keys, think_s=think_s), vocab=100)
    assert len(made) == num_requests
    by_id = {request.id: request for request in made}
    starts = [request for request in made if request.after is None]
    assert len(starts) == min(num_users, num_requests)
    assert all(request.arrival_s == 0.0 for request in starts)
    assert all(request.arrival_s == think_s for request in made if request.after is not None)
    assert not any(request.continues for request in made)
    followed = [request.after for request in made if request.after is not None]
    assert len(set(followed)) == len(followed) and set(followed) <= set(by_id)  # nobody is followed twice
    for user in range(len(starts)):  # request i is of user i modulo num_users
        chain = made[user::num_users]
        assert [request.after for request in chain] == [None, *(request.id for request in chain[:-1])]


def conversation(**keys: Any) -> Any:
    return section(**{"kind": "conversation", "num_conversations": 4, "turns": 3, "rate_req_s": 2.0, **keys})


@settings(max_examples=50, deadline=None)
@given(
    conversations=st.integers(1, 8),
    turns=st.integers(1, 5),
    users=st.none() | st.integers(1, 4),
    think_s=st.floats(0, 9),
    system=st.integers(0, 12),
)
def test_conversations_are_chains_of_turns(
    conversations: int, turns: int, users: int | None, think_s: float, system: int
) -> None:
    rate = 2.0 if users is None else None
    keys: dict[str, Any] = {"num_conversations": conversations, "turns": turns, "system_tokens": system}
    chosen = conversation(**keys, rate_req_s=rate, num_users=users, think_s=think_s)
    made = make_requests(chosen, vocab=2**31)
    assert len(made) == chosen.num_requests == conversations * turns
    for number in range(conversations):
        first, *others = made[number * turns : (number + 1) * turns]
        assert not first.continues
        assert system + 2 <= len(first.prompt) <= system + 5
        assert first.prompt[:system] == made[0].prompt[:system]
        if users is None:
            assert first.after is None and first.arrival_s > 0
        elif number < users:
            assert first.after is None and first.arrival_s == 0.0
        else:
            last_turn = made[(number - users + 1) * turns - 1]
            assert first.after == last_turn.id and first.arrival_s == think_s
        for before, turn in itertools.pairwise([first, *others]):
            assert turn.after == before.id and turn.continues and turn.arrival_s == think_s
            assert 2 <= len(turn.prompt) <= 5
    texts = [r.prompt[0 if r.continues else system :] for r in made]
    assert len(set(texts)) == len(texts)  # nothing but the system prompt is shared


def test_conversations_start_at_their_rate() -> None:
    rows = load_rows(conversation(num_conversations=4000, turns=2, rate_req_s=5.0), Path())
    starts = np.diff([0.0, *(row.arrival_s for row in rows if row.after is None)])
    assert len(starts) == 4000
    assert starts.mean() == pytest.approx(0.2, rel=0.06) and starts.std() / starts.mean() == pytest.approx(1, abs=0.06)


def test_a_scaled_system_prompt_is_still_shared() -> None:
    made = make_requests(conversation(system_tokens=100, length_scale=8.0), vocab=2**31)
    firsts = [request.prompt for request in made if not request.continues]
    assert {prompt[:13] for prompt in firsts} == {firsts[0][:13]}  # ceil(100 / 8)
    assert all(len(prompt) in (13, 14) for prompt in firsts)
    other = make_requests(conversation(system_tokens=100, length_scale=8.0, seed=1), vocab=2**31)
    assert other[0].prompt[0] != firsts[0][0]


def test_table_of_conversations() -> None:
    table = workload_table(conversation(system_tokens=100))
    assert table["shared_prefix_tokens"].tolist() == [0, 0, 0, *[100, 0, 0] * 3]
    assert table["continues"].tolist() == [False, True, True] * 4
    assert table["after"].tolist()[1:3] == ["r00000", "r00001"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_requests": 12}, "'num_requests' follows from num_conversations * turns; leave it out"),
        ({"num_users": 2}, "expected either 'rate_req_s' (Poisson starts) or 'num_users' (closed loop)"),
        ({"rate_req_s": None}, "expected either 'rate_req_s' (Poisson starts) or 'num_users' (closed loop)"),
        ({"num_conversations": 10**6}, "3,000,000 turns in all; expected at most 1,000,000"),
        ({"system_tokens": -1}, "greater than or equal to 0"),
        ({"system_tokens": 10**12}, "less than or equal to 10000000"),
        ({"think_s": -1.0}, "greater than or equal to 0"),
        ({"turns": 0}, "greater than 0"),
        ({"rate_scale": 2.0}, "unknown key 'rate_scale'"),
    ],
)
def test_wrong_conversations_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        conversation(**keys)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "gamma", "num_requests": 1, "rate_req_s": 1.0, "cv": 0.0}, "greater than or equal to 0.01"),
        ({"kind": "gamma", "num_requests": 1, "rate_req_s": 0.0, "cv": 1.0}, "greater than 0"),
        ({"kind": "poisson", "num_requests": 1, "rate_req_s": float("nan")}, "finite number"),
        ({"kind": "closed_loop", "num_requests": 1, "num_users": 0}, "greater than 0"),
        ({"kind": "closed_loop", "num_requests": 1, "num_users": 1, "think_s": -1.0}, "greater than or equal to 0"),
    ],
)
def test_wrong_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        section(**keys)
    assert message in str(caught.value)


def test_a_first_turn_beyond_all_limits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"makes a request of 10,000,00[2-5] tokens"):
        load_rows(conversation(num_conversations=1, system_tokens=10_000_000), Path())
