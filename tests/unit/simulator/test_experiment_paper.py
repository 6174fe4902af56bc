"""experiments/paper: every published row has a prediction, and errors are what they say."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from math import isfinite
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "experiments" / "paper" / "predict.py"


@pytest.fixture(scope="module")
def predict():
    spec = importlib.util.spec_from_file_location("paper_predict", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper_predict"] = module
    spec.loader.exec_module(module)
    return module


def test_rows_and_predictions_are_the_same_ones(predict):
    with predict.PUBLISHED.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == list(predict.PREDICTED)
    assert {row["side"] for row in rows} <= {"both", "above", "below"}
    assert {row["counted"] for row in rows} <= {"yes", "no"}


def test_the_script_writes_a_table_with_every_row(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "out.csv"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    counted = [row for row in rows if row["counted"] == "yes"]
    assert (len(rows), len(counted)) == (31, 26) and f"{len(counted)} rows: median" in done.stdout
    for row in rows:
        predicted, error = float(row["predicted"]), float(row["error"])
        assert isfinite(predicted) and predicted > 0
        beyond = predicted / float(row["published"]) - 1
        kept = (row["side"] == "above" and beyond > 0) or (row["side"] == "below" and beyond < 0)
        assert error == (0 if kept else pytest.approx(beyond))


def test_the_floor_of_a_pass_is_the_model_over_the_link(predict):
    """Short prompts take what 58 layers of experts take to cross: PAPER, about 12 s."""
    assert 2048 / predict.prefill(predict.R1, predict.R1_SHAPE, 2048) == pytest.approx(654e9 / 54.5e9, rel=0.02)


def test_a_second_buffer_is_worth_less_where_one_side_is_much_longer(predict):
    """FreeToken's direction: without it prompts are slower, and very short ones lose least."""
    short, middle = predict.second_buffer(256), predict.second_buffer(8192)
    assert middle < short < 1


def test_the_stored_table_is_what_is_predicted(predict):
    stored = Path(__file__).parents[3] / "results" / "paper" / "paper" / "predictions.csv"
    with stored.open() as file:
        rows = {row["row"]: float(row["predicted"]) for row in csv.DictReader(file)}
    assert rows == {row["row"]: pytest.approx(row["predicted"], rel=1e-6) for row in predict.rows()}
