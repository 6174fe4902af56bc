from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import hybridlab as hl
from hybridlab.errors import ConfigError
from hybridlab.request import Request
from hybridlab.workload import WORKLOAD_KINDS, Workload, content_hash, load_rows, make_requests, warmup_requests

DATA = Path(__file__).resolve().parents[3] / "experiments" / "data"
OFFLINE: dict[str, Any] = {"kind": "offline", "num_requests": 2, "prompt_tokens": 8, "output_tokens": 4}
EXAMPLES: dict[str, dict[str, Any]] = {
    "azure": {"path": "azure_2023_code_slice.csv", "num_requests": 5},
    "mooncake": {"path": "mooncake_conversation_slice.jsonl", "num_requests": 5, "length_scale": 100.0},
    "servegen": {"path": "servegen_deepseek_r1_slice", "num_requests": 5, "length_scale": 100.0},
    "poisson": {"num_requests": 5, "rate_req_s": 2.0, "prompt_tokens": [1, 9], "output_tokens": [1, 9]},
    "gamma": {"num_requests": 5, "rate_req_s": 2.0, "cv": 3.0, "prompt_tokens": [1, 9], "output_tokens": [1, 9]},
    "offline": {"num_requests": 5, "prompt_tokens": [1, 9], "output_tokens": [1, 9]},
    "closed_loop": {"num_requests": 5, "num_users": 2, "prompt_tokens": [1, 9], "output_tokens": [1, 9]},
    "conversation": {
        "num_conversations": 2,
        "turns": 3,
        "rate_req_s": 1.0,
        "system_tokens": 7,
        "prompt_tokens": [1, 9],
        "output_tokens": [1, 9],
    },
}


def workload(**keys: Any) -> Any:
    return TypeAdapter(Workload).validate_python(keys)


@pytest.fixture
def examples(tmp_path: Path) -> dict[str, Any]:
    """A workload of every kind."""
    trace = tmp_path / "burst.csv"
    lines = [f"{2 * i},GPT-4,{10 + i},{5 + i},{15 + 2 * i},API log\n" for i in range(9)]
    trace.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "".join(lines))
    keys = {**EXAMPLES, "burstgpt": {"path": str(trace), "num_requests": 5}}
    return {kind: workload(kind=kind, **keys[kind]) for kind in WORKLOAD_KINDS}


def test_every_kind_is_listed_once_and_has_an_example(examples: dict[str, Any]) -> None:
    assert len(set(WORKLOAD_KINDS)) == len(WORKLOAD_KINDS) == len(get_args(get_args(Workload)[0])) == 9
    assert list(examples) == list(WORKLOAD_KINDS)


def test_every_kind_makes_what_it_promises(examples: dict[str, Any]) -> None:
    for kind, section in examples.items():
        made = make_requests(section, vocab=50, base=DATA)
        assert len(made) == section.num_requests, kind
        assert [r.id for r in made] == [f"r{i:05d}" for i in range(len(made))]
        assert all(0 <= token < 50 for r in made for token in r.prompt), kind
        assert all(type(token) is int for r in made for token in r.prompt), kind
        assert all(r.max_tokens >= 1 and len(r.prompt) >= 1 and r.arrival_s >= 0 for r in made), kind
        assert all(r.stop_token_ids == () and r.timeout_s is None for r in made), kind
        assert made == make_requests(section, vocab=50, base=DATA), kind


def test_every_kind_follows_its_seed(examples: dict[str, Any]) -> None:
    for kind, section in examples.items():
        other = section.model_copy(update={"seed": 1})
        one, two = make_requests(section, vocab=1000, base=DATA), make_requests(other, vocab=1000, base=DATA)
        assert all(a.prompt != b.prompt for a, b in zip(one, two, strict=True) if len(a.prompt) > 3), kind
        assert one[0].sampling.seed != two[0].sampling.seed, kind


def test_every_kind_takes_a_timeout_and_clips(examples: dict[str, Any]) -> None:
    for kind, section in examples.items():
        cut = section.model_copy(update={"timeout_s": 2.5, "max_prompt_tokens": 2, "max_output_tokens": 1})
        plain = make_requests(section, vocab=50, base=DATA)
        for before, after in zip(plain, make_requests(cut, vocab=50, base=DATA), strict=True):
            assert after.timeout_s == 2.5 and after.max_tokens == 1, kind
            assert after.prompt == before.prompt[:2], kind  # the beginning stays
            assert (after.arrival_s, after.after, after.continues) == (before.arrival_s, before.after, before.continues)


def test_every_kind_reads_back_from_its_resolved_form(examples: dict[str, Any]) -> None:
    for section in examples.values():
        assert workload(**section.model_dump()) == section


def test_output_lengths_may_keep_their_own_scale() -> None:
    keys: dict[str, Any] = {"kind": "offline", "num_requests": 1, "prompt_tokens": 80, "output_tokens": 80}
    (both,) = make_requests(workload(**keys, length_scale=8.0), vocab=9)
    (own,) = make_requests(workload(**keys, length_scale=8.0, output_length_scale=2.0), vocab=9)
    assert (len(both.prompt), both.max_tokens) == (10, 10)
    assert (len(own.prompt), own.max_tokens) == (10, 40)


def test_tokens_depend_on_seed_and_index_alone() -> None:
    many = make_requests(workload(**{**OFFLINE, "num_requests": 5}), vocab=1000)
    few = make_requests(workload(**OFFLINE), vocab=1000)
    assert [r.prompt for r in many[:2]] == [r.prompt for r in few]
    assert [r.sampling.seed for r in many[:2]] == [r.sampling.seed for r in few]
    assert len({r.prompt for r in many}) == 5
    assert many[3].prompt == tuple(np.random.default_rng([0, 3]).integers(0, 1000, 8).tolist())


def test_large_vocabularies_are_not_interned() -> None:
    (one, _) = make_requests(workload(**OFFLINE), vocab=2**40)
    assert max(one.prompt) > 2**33 and all(type(token) is int for token in one.prompt)


def test_sampling_reaches_the_requests() -> None:
    made = make_requests(workload(**OFFLINE, sampling={"temperature": 0.7, "top_p": 0.9}), vocab=9)
    assert (made[0].sampling.temperature, made[0].sampling.top_p) == (0.7, 0.9)
    assert made[0].sampling.seed != made[1].sampling.seed


@settings(max_examples=50, deadline=None)
@given(
    low=st.integers(1, 50),
    extra=st.integers(0, 50),
    scale=st.floats(0.1, 100),
    limit=st.none() | st.integers(1, 40),
)
def test_lengths_are_scaled_rounded_up_and_clipped(low: int, extra: int, scale: float, limit: int | None) -> None:
    keys: dict[str, Any] = {"kind": "offline", "num_requests": 5, "prompt_tokens": [low, low + extra]}
    scaled = workload(**keys, output_tokens=low, length_scale=scale, max_prompt_tokens=limit)
    for row, request in zip(load_rows(scaled, Path()), make_requests(scaled, vocab=7), strict=True):
        assert low <= row.prompt_tokens <= low + extra
        assert len(request.prompt) == min(int(np.ceil(row.prompt_tokens / scale)), limit or 10**9)
        assert request.max_tokens == int(np.ceil(low / scale))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt_tokens": 10**12}, "expected at most 10,000,000 tokens, got 1000000000000"),
        ({"prompt_tokens": [9, 3]}, "[low, high] with 1 <= low <= high"),
        ({"prompt_tokens": [1.5, 3]}, "[low, high] with 1 <= low <= high"),
        ({"timeout_s": 0.0}, "greater than 0"),
        ({"max_prompt_tokens": 0}, "greater than 0"),
        ({"num_requests": 10**7}, "less than or equal to 1000000"),
        ({"rate_scale": 2.0}, "unknown key 'rate_scale'"),
    ],
)
def test_wrong_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        workload(**{**OFFLINE, **keys})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"length_scale": 1e-9}, "workload.length_scale: makes a request of 8,000,000,000 tokens; expected at most"),
        ({"length_scale": 1e-300}, "makes a request of 1,000,000,000,000 or more tokens; expected at most 10,000,000"),
        ({"length_scale": 5e-324}, "makes a request of 1,000,000,000,000 or more tokens"),
        ({"output_length_scale": 1e-9}, "workload.output_length_scale: makes a request of 4,000,000,000 tokens"),
        ({"num_requests": 200, "prompt_tokens": 9_000_000}, "1,800,000,000 prompt tokens in all; expected at most"),
    ],
)
def test_what_would_fill_the_memory_is_refused_before_it_is_made(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_rows(workload(**{**OFFLINE, **keys}), Path())
    assert message in str(caught.value)


def test_arrivals_beyond_reason_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"arrives at .* s; expected at most 1e"):
        load_rows(workload(**{**OFFLINE, "kind": "poisson", "rate_req_s": 1e-300}), Path())


def test_warmup_shares_lengths_but_not_tokens() -> None:
    requests = make_requests(workload(kind="azure", num_requests=2, path=EXAMPLES["azure"]["path"]), 1000, base=DATA)
    warm = warmup_requests(requests, 3, vocab=1000)
    assert [len(r.prompt) for r in warm] == [len(requests[i % 2].prompt) for i in range(3)]
    assert [r.max_tokens for r in warm] == [requests[i % 2].max_tokens for i in range(3)]
    assert all(r.arrival_s == 0.0 and r.after is None for r in warm)
    assert not {r.id for r in warm} & {r.id for r in requests}


@given(first=st.sets(st.integers(0, 9), min_size=1, max_size=9))
def test_warmup_never_begins_like_a_measured_request(first: set[int]) -> None:
    requests = [Request(f"r{token}", (token, 0), 1) for token in first]
    warm = warmup_requests(requests, 20, vocab=10)
    assert not {r.prompt[0] for r in warm} & first
    assert all(0 <= token < 10 for r in warm for token in r.prompt)


def test_warmup_of_a_vocabulary_that_is_used_up() -> None:
    assert len(warmup_requests([Request("a", (0,), 1), Request("b", (1,), 1)], 3, vocab=2)) == 3


def test_tables_show_what_is_served() -> None:
    table = hl.workload_table({"kind": "azure", **EXAMPLES["azure"], "length_scale": 10.0}, base=DATA)
    made = make_requests(workload(kind="azure", **EXAMPLES["azure"], length_scale=10.0), 50, base=DATA)
    assert list(table.columns) == [
        "request_id",
        "arrival_s",
        "after",
        "continues",
        "prompt_tokens",
        "output_tokens",
    ]
    assert table["request_id"].tolist() == [r.id for r in made]
    assert table["prompt_tokens"].tolist() == [len(r.prompt) for r in made]
    assert table["output_tokens"].tolist() == [r.max_tokens for r in made]
    assert table["arrival_s"].tolist() == [r.arrival_s for r in made]
    assert set(table["after"].isna().tolist()) == {True}


def test_tables_take_paths_from_the_project_and_sections_as_they_are() -> None:
    keys = {"kind": "azure", "num_requests": 3, "path": "experiments/data/azure_2023_code_slice.csv"}
    assert len(hl.workload_table(keys)) == len(hl.workload_table(workload(**keys))) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "azur"}, "workload: unknown kind 'azur'; did you mean 'azure'?"),
        ({**OFFLINE, "prompt_tokns": 3}, "workload: unknown key 'prompt_tokns'; did you mean 'prompt_tokens'?"),
        ({**OFFLINE, "num_requests": 0}, "workload.num_requests: expected a number greater than 0, got 0"),
        (3, "workload: expected a mapping or a config's workload, got int"),
    ],
)
def test_tables_say_what_is_wrong_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hl.workload_table(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_content_hash_follows_the_content(tmp_path: Path, examples: dict[str, Any]) -> None:
    hashes = {kind: content_hash(section, DATA) for kind, section in examples.items()}
    assert [kind for kind, value in hashes.items() if value] == ["azure", "burstgpt", "mooncake", "servegen"]
    assert len({value for value in hashes.values() if value}) == 4
    section = workload(kind="azure", path="a.csv", num_requests=1)
    (tmp_path / "a.csv").write_text("one")
    one = content_hash(section, tmp_path)
    (tmp_path / "a.csv").write_text("two")
    assert one != content_hash(section, tmp_path)
    with pytest.raises(ConfigError, match=r"workload\.path: .*b\.csv: cannot be read"):
        content_hash(section.model_copy(update={"path": "b.csv"}), tmp_path)
