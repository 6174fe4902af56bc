from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from hybridlab.errors import ConfigError
from hybridlab.workload import Workload, content_hash, load_rows

SLICE = Path(__file__).resolve().parents[3] / "experiments" / "data" / "servegen_deepseek_r1_slice"
SLICE_REQUESTS = 8589
DATASET = json.dumps({"0": {"input_tokens": "{10: 0.25, 20: 0.75}", "output_tokens": "{3: 1.0}"}})


def servegen(path: Path = SLICE, **keys: Any) -> Any:
    keys = {"kind": "servegen", "path": str(path), "num_requests": 2, **keys}
    return TypeAdapter(Workload).validate_python(keys)


def rows(path: Path = SLICE, **keys: Any) -> list[Any]:
    return load_rows(servegen(path, **keys), Path())


def client(folder: Path, trace: str, dataset: str = DATASET, name: str = "chunk-0") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-trace.csv").write_text(trace)
    (folder / f"{name}-dataset.json").write_text(dataset)
    return folder


def test_slice_has_as_many_requests_as_were_counted() -> None:
    counted = sum(float(line[1]) * 600 for path in SLICE.glob("*.csv") for line in csv.reader(path.open()))
    assert counted == pytest.approx(SLICE_REQUESTS)
    made = rows(num_requests=SLICE_REQUESTS)
    times = [row.arrival_s for row in made]
    assert times[0] == 0.0 and times == sorted(times) and 7100 < times[-1] <= 7200
    assert np.median([row.prompt_tokens for row in made]) == pytest.approx(365, rel=0.1)  # README of the data
    assert np.median([row.output_tokens for row in made]) == pytest.approx(455, rel=0.1)
    with pytest.raises(ConfigError, match=f"{SLICE_REQUESTS} requests from 0 s to the end at 50400 s; workload.num"):
        rows(num_requests=SLICE_REQUESTS + 1)


@settings(max_examples=15, deadline=None)
@given(start_s=st.floats(43_200, 49_000), num_requests=st.integers(20, 300), seed=st.integers(0, 2))
def test_a_choice_of_requests_is_a_part_of_all_of_them(start_s: float, num_requests: int, seed: int) -> None:
    everything = rows(num_requests=SLICE_REQUESTS, seed=seed)
    chosen = rows(num_requests=num_requests, seed=seed, start_s=start_s)
    lengths = [row[1:3] for row in everything]
    first = next(i for i in range(len(lengths)) if lengths[i : i + num_requests] == [row[1:3] for row in chosen])
    shift_s = everything[first].arrival_s
    assert shift_s > start_s - 43_205  # the first one of all comes within five seconds
    assert first == 0 or everything[first - 1].arrival_s < start_s - 43_200
    for one, two in zip(everything[first : first + num_requests], chosen, strict=True):
        assert one.arrival_s - shift_s == pytest.approx(two.arrival_s, abs=1e-6)


def test_clients_may_have_windows_of_their_own(tmp_path: Path) -> None:
    client(tmp_path / "clients", "0,0.1,1,Gamma,1,1\n1000,0.1,1,Gamma,1,1\n")
    client(tmp_path / "clients", "".join(f"{10 * n},1,1,Gamma,1,1\n" for n in range(100)), name="chunk-1")
    everything = rows(tmp_path / "clients", num_requests=1100)
    assert rows(tmp_path / "clients", num_requests=15) == everything[:15]
    assert everything[14].arrival_s < 30


def test_seeds_and_rates() -> None:
    one, two = rows(num_requests=500), rows(num_requests=500, seed=1)
    assert [row.arrival_s for row in one] != [row.arrival_s for row in two]
    assert [row.prompt_tokens for row in one] != [row.prompt_tokens for row in two]
    scaled = rows(num_requests=500, rate_req_s=4.0)
    assert 499 / scaled[-1].arrival_s == pytest.approx(4.0)
    assert [row[1:] for row in scaled] == [row[1:] for row in one]
    faster = rows(num_requests=500, rate_scale=10.0)
    assert faster[-1].arrival_s == pytest.approx(one[-1].arrival_s / 10)


def test_content_hash_of_a_folder_follows_names_and_content(tmp_path: Path) -> None:
    folder = client(tmp_path / "clients", "0,1,1,Gamma,1,1\n600,0,0,,0,0\n")
    one = content_hash(servegen(folder), Path())
    (folder / "notes.txt").write_text("not read")
    assert content_hash(servegen(folder), Path()) == one
    (folder / "chunk-0-dataset.json").write_text(DATASET + " ")
    two = content_hash(servegen(folder), Path())
    (folder / "chunk-0-dataset.json").rename(folder / "chunk-1-dataset.json")
    assert len({one, two, content_hash(servegen(folder), Path())}) == 3


def weibull_cv(shape: float) -> float:
    return math.sqrt(math.gamma(1 + 2 / shape) / math.gamma(1 + 1 / shape) ** 2 - 1)


@pytest.mark.parametrize(
    ("family", "shape", "cv"),
    [
        ("Gamma", 1.0, 1.0),
        ("Gamma", 0.0625, 4.0),
        ("Gamma", 16.0, 0.25),
        ("Weibull", 0.5, weibull_cv(0.5)),
        ("Weibull", 2.0, weibull_cv(2.0)),
    ],
)
def test_gaps_have_the_burstiness_of_their_family(tmp_path: Path, family: str, shape: float, cv: float) -> None:
    folder = client(tmp_path / "clients", f"0,4,9.9,{family},{shape},123\n5000,4,9.9,{family},{shape},123\n")
    made = rows(folder, num_requests=40_000)
    gaps = np.diff([row.arrival_s for row in made])
    assert gaps.mean() == pytest.approx(0.25, rel=0.01)  # the scale (123) says nothing
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    halves = np.histogram([row.arrival_s for row in made], bins=2)[0]
    assert abs(halves[0] - 20_000) <= 2500 * cv / 4 + 10  # exact but for the arrivals around the first one


def test_bursty_clients_do_not_all_start_with_their_window(tmp_path: Path) -> None:
    for number in range(40):
        client(tmp_path / "clients", "0,0.1,9,Gamma,0.01,1\n600,0.1,9,Gamma,0.01,1\n", name=f"chunk-{number}")
    made = rows(tmp_path / "clients", num_requests=40 * 120)
    counts = np.histogram([row.arrival_s for row in made], bins=12, range=(0, 1200))[0]
    assert counts.max() < 2.5 * counts.mean()


def test_tiny_shapes_are_bursts_at_one_time(tmp_path: Path) -> None:
    folder = client(tmp_path / "clients", "0,1,999,Gamma,1e-6,1\n100,1,999,Weibull,1e-6,1\n")
    times = np.array([row.arrival_s for row in rows(folder, num_requests=200)])
    assert np.isfinite(times).all() and len(np.unique(times.round(3))) < 20


def test_lengths_follow_the_window_of_lengths_that_holds(tmp_path: Path) -> None:
    dataset = {
        "0": {
            "input_tokens": "{10: 0.25, 20: 0.75}",
            "output_tokens": "{3: 0.5, 4: 0.5}",
            "reason_ratio": "{0.0: 1.0}",
        },
        "1000": {"input_tokens": "{}", "output_tokens": "{}"},  # nothing was seen: the one before it holds
        "2000": {"input_tokens": "{0: 1.0}", "output_tokens": "{700: 1.0}"},
    }
    lines = "".join(f"{t},2,1,Gamma,1,1\n" for t in (0, 1000, 2000))
    folder = client(tmp_path / "clients", lines, json.dumps(dataset))
    made = rows(folder, num_requests=6000)
    before, after = made[:4000], made[4000:]
    prompts = np.array([row.prompt_tokens for row in before])
    assert set(prompts) == {10, 20} and np.mean(prompts == 20) == pytest.approx(0.75, abs=0.03)
    outputs = np.array([row.output_tokens for row in before])
    assert set(outputs) == {3, 4} and np.mean(outputs == 4) == pytest.approx(0.5, abs=0.03)
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.06  # drawn independently
    assert {row[1:3] for row in after} == {(1, 700)}  # a prompt has at least one token


def test_a_fraction_of_a_request_is_one_now_and_then(tmp_path: Path) -> None:
    lines = "".join(f"{100 * t},0.005,1,Gamma,1,1\n" for t in range(400))
    folder = client(tmp_path / "clients", lines)
    with pytest.raises(ConfigError) as caught:
        rows(folder, num_requests=1000)
    assert 150 < int(str(caught.value).split(": ")[1].split()[0]) < 250


GOOD = "0,1,1,Gamma,1,1\n600,1,1,Gamma,1,1\n"


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ("0,1,1,Gamma,1\n", "chunk-0-trace.csv: line 1: 5 columns; expected time, rate, cv, family and two parameters"),
        ("t,rate,cv,family,a,b\n" + GOOD, "chunk-0-trace.csv: line 1: time 't': expected a number >= 0"),
        ("0,-1,1,Gamma,1,1\n", "chunk-0-trace.csv: line 1: rate '-1': expected a number >= 0"),
        ("0,nan,1,Gamma,1,1\n", "chunk-0-trace.csv: line 1: rate 'nan': expected a number >= 0"),
        ("0,1,x,Gamma,1,1\n", "chunk-0-trace.csv: line 1: cv 'x': expected a number >= 0"),
        ("0,1,1,Pareto,1,1\n", "chunk-0-trace.csv: line 1: family 'Pareto': expected Gamma or Weibull"),
        ("0,1,1,,1,1\n", "chunk-0-trace.csv: line 1: family '': expected Gamma or Weibull"),
        ("0,1,1,Gamma,0,1\n", "chunk-0-trace.csv: line 1: first parameter 0: expected a shape from 1e-6 to 1e6"),
        ("0,1,1,Gamma,1,\n", "chunk-0-trace.csv: line 1: second parameter '': expected a number >= 0"),
        ("0,1,1,Gamma,1,1\n", "chunk-0-trace.csv: 1 windows; expected at least two"),
        ("", "chunk-0-trace.csv: 0 windows; expected at least two"),
        ("600,1,1,Gamma,1,1\n0,1,1,Gamma,1,1\n", "chunk-0-trace.csv: line 2: time 0 does not follow 600"),
        (
            "0,1e9,1,Gamma,1,1\n600,1,1,Gamma,1,1\n",
            "chunk-0-trace.csv: 6e+11 requests in the window at 0 s; expected at",
        ),
        ("0,0,0,,0,0\n600,0,0,,0,0\n", "0 requests from 0 s to the end at 0 s"),
    ],
)
def test_bad_windows_are_named(tmp_path: Path, trace: str, message: str) -> None:
    folder = client(tmp_path / "clients", trace)
    with pytest.raises(ConfigError) as caught:
        rows(folder)
    assert str(folder) in str(caught.value) and message in str(caught.value)


def dataset(prompt: Any = "{1: 1.0}", output: Any = "{1: 1.0}", time: str = "0") -> str:
    return json.dumps({time: {"input_tokens": prompt, "output_tokens": output}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "chunk-0-dataset.json: not JSON"),
        ("[1]", "chunk-0-dataset.json: expected a JSON object, got [1]"),
        ("{}", "chunk-0-dataset.json: no lengths for the window at 0 s or before it"),
        (dataset(time="600"), "chunk-0-dataset.json: no lengths for the window at 0 s or before it"),
        (dataset(prompt="{}"), "chunk-0-dataset.json: no lengths for the window at 0 s or before it"),
        (dataset(time="noon"), "chunk-0-dataset.json: key 'noon': expected the start of a window in seconds"),
        ('{"0": 3}', "chunk-0-dataset.json: 0: expected an object, got 3"),
        (
            '{"0": {"input_tokens": "{1: 1.0}"}}',
            "chunk-0-dataset.json: 0: output_tokens None: expected the text of a dict",
        ),
        (dataset(prompt={"1": 1.0}), "chunk-0-dataset.json: 0: input_tokens {'1': 1.0}: expected the text of a dict"),
        (dataset(prompt="[1, 2]"), "0: input_tokens: '[1, 2]': expected the text of a dict of numbers"),
        (dataset(prompt="{1, 2}"), "0: input_tokens: '{1, 2}': expected the text of a dict of numbers"),
        (dataset(prompt="__import__('os').getpid()"), "expected the text of a dict of numbers"),
        (dataset(prompt="{1: open('x')}"), "expected the text of a dict of numbers"),
        (dataset(prompt="{1: {2: 3}}"), "expected the text of a dict of numbers"),
        (dataset(prompt="{1: -1.0}"), "expected the text of a dict of numbers"),
        (dataset(prompt="{1: nan}"), "expected the text of a dict of numbers"),
        (dataset(prompt="{1: 1.0"), "expected the text of a dict of numbers"),
        (dataset(prompt="(" * 10_000), "expected the text of a dict of numbers"),
        (dataset(prompt="{" + " " * 50_000 + "x}"), "expected the text of a dict of numbers"),
        (dataset(prompt="{" + "1: 1.0, " * 300_000 + "}"), "expected the text of a dict of numbers"),
        (dataset(prompt="{1.5: 1.0}"), "0: input_tokens: 1.5: expected a whole number of at most 10,000,000 tokens"),
        (dataset(prompt=f"{{{10**12}: 1.0}}"), "1000000000000: expected a whole number of at most 10,000,000 tokens"),
        (dataset(prompt="{1: 0.5, 2: 0.4}"), "0: input_tokens: probabilities sum to 0.9; expected 1"),
        (dataset(prompt="{1: 1e999}"), "0: input_tokens: probabilities sum to inf; expected 1"),
    ],
)
def test_bad_lengths_are_named(tmp_path: Path, text: str, message: str) -> None:
    folder = client(tmp_path / "clients", GOOD, text)
    with pytest.raises(ConfigError) as caught:
        rows(folder)
    assert str(folder) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(folder)) + 200


def test_only_the_lengths_that_are_used_are_looked_at(tmp_path: Path) -> None:
    later = {**json.loads(DATASET), "600": {"input_tokens": "broken", "output_tokens": "broken"}}
    folder = client(tmp_path / "clients", GOOD, json.dumps(later))
    assert len(rows(folder, num_requests=600)) == 600
    with pytest.raises(ConfigError, match="600: input_tokens: 'broken': expected the text of a dict"):
        rows(folder, num_requests=601)
