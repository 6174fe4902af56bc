"""No BurstGPT file is part of this repository: its format is tried on lines written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from hybridlab.errors import ConfigError
from hybridlab.workload import Workload, load_rows

RELEASE_1 = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
50,ChatGPT,0,0,0,Conversation log
118,GPT-4,417,276,693,Conversation log
120,GPT-4,300,0,300,API log
130,GPT-4,31,7,38,API log
"""
RELEASE_2 = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82-0a46-4bf0-aa08-89794e7a2b3f,43,GPT-4,906,446,1352,Conversation log
19440161.5,,2,ChatGPT,36,29,65,API log
"""


def burstgpt(path: Path, **keys: Any) -> Any:
    return TypeAdapter(Workload).validate_python({"kind": "burstgpt", "path": str(path), "num_requests": 2, **keys})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "BurstGPT_1.csv"
    path.write_text(RELEASE_1)
    return path


def rows(path: Path, **keys: Any) -> list[tuple[float, int, int]]:
    return [row[:3] for row in load_rows(burstgpt(path, **keys), Path())]


def test_failed_requests_are_left_out(trace: Path) -> None:
    expected = [(0.0, 472, 18), (40.0, 1087, 230), (113.0, 417, 276), (125.0, 31, 7)]
    assert rows(trace, num_requests=4) == expected
    assert rows(trace, start=2) == [(0.0, 417, 276), (12.0, 31, 7)]


def test_rows_are_chosen_by_model_and_kind_of_log(trace: Path) -> None:
    assert rows(trace, model="GPT-4") == [(0.0, 417, 276), (12.0, 31, 7)]
    assert rows(trace, num_requests=1, log_type="API log") == [(0.0, 31, 7)]
    assert rows(trace, num_requests=1, model="GPT-4", log_type="Conversation log") == [(0.0, 417, 276)]


def test_times_scale(trace: Path) -> None:
    assert rows(trace, rate_scale=10.0) == [(0.0, 472, 18), (4.0, 1087, 230)]
    assert rows(trace, rate_req_s=0.5) == [(0.0, 472, 18), (2.0, 1087, 230)]


def test_columns_of_release_2_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "BurstGPT_3.csv").write_text(RELEASE_2)
    assert rows(tmp_path / "BurstGPT_3.csv") == [(0.0, 906, 446), (51.5, 36, 29)]


def test_columns_that_choose_nothing_are_not_needed(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("Timestamp,Request tokens,Response tokens\n1,2,3\n2,3,4\n")
    assert rows(path) == [(0.0, 2, 3), (1.0, 3, 4)]
    with pytest.raises(ConfigError, match="no column 'Model'; expected Timestamp, Request tokens, Response tokens, M"):
        rows(path, model="GPT-4")


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        (RELEASE_1, {"num_requests": 5}, "4 rows that were answered; workload.start + num_requests asks for 5"),
        (RELEASE_1, {"model": "GPT-5"}, "no row 0 that were answered, Model 'GPT-5'; workload.start"),
        (RELEASE_1.replace("Timestamp", "Time"), {}, "no column 'Timestamp'; expected Timestamp, Request tokens, Resp"),
        (RELEASE_1.replace("45,", "soon,"), {}, "line 3: Timestamp 'soon': expected a number >= 0"),
        (RELEASE_1.replace("45,", "nan,"), {}, "line 3: Timestamp 'nan': expected a number >= 0"),
        (RELEASE_1.replace("45,", "-45,"), {}, "line 3: Timestamp '-45': expected a number >= 0"),
        (RELEASE_1.replace("45,", "inf,"), {}, "line 3: Timestamp 'inf': expected a number >= 0"),
        (RELEASE_1.replace("45,", "4,"), {}, "line 3: Timestamp goes back; expected arrival order"),
        (RELEASE_1.replace("1087", "1087.5"), {}, "line 3: Request tokens '1087.5': expected a whole number"),
        (RELEASE_1.replace("1087", "-1"), {}, "line 3: Request tokens '-1': expected a whole number"),
        (RELEASE_1.replace("230", str(10**12)), {}, "line 3: Response tokens '1000000000000': expected at most 10,000"),
        (RELEASE_1.replace("1087,230,1317,Conversation log", "1087"), {}, "line 3: Response tokens ''"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, text: str, keys: dict[str, Any], message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_rows(burstgpt(path, **keys), Path())
    assert str(path) in str(caught.value) and message in str(caught.value)
