"""experiments/published_decode: every row has a time, groups are held out, and the error is what is claimed."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from hybridlab.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def predict():
    spec = importlib.util.spec_from_file_location("decode_predict", ROOT / "experiments/published_decode/predict.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decode_predict"] = module
    spec.loader.exec_module(module)
    return module


def test_half_of_the_rows_are_within_a_fifth(predict):
    rows = predict.read()
    found = predict.table(rows)
    assert len(found) == len(rows) == 33
    assert median(abs(row["error"]) for row in found) < 0.20
    with (ROOT / "results/paper/published_decode/predictions.csv").open() as file:
        stored = {row["id"]: float(row["predicted"]) for row in csv.DictReader(file)}
    assert stored == {row["id"]: pytest.approx(row["predicted"], rel=1e-6) for row in found}


def test_a_row_comes_out_at_its_own_efficiency(predict):
    for row in predict.read():
        assert 1 / row.step_s(row.efficiency) == pytest.approx(row.published, rel=1e-6)
        assert row.step_s(0.4) > row.step_s(0.5)


def test_what_a_group_published_does_not_reach_its_own_prediction(predict):
    rows = predict.read()
    group = rows[0].group
    changed = [
        replace(row, fields={**row.fields, "decode_tok_s": str(row.published * 3)}) if row.group == group else row
        for row in rows
    ]
    assert changed != rows and predict.held_out(changed, changed[0]) == predict.held_out(rows, rows[0])
    other = next(i for i, row in enumerate(rows) if row.engine == rows[0].engine and row.group != group)
    assert predict.held_out(changed, changed[other]) > predict.held_out(rows, rows[other])


def test_fewer_layers_on_the_host_and_fewer_bits_are_faster(predict):
    row = next(row for row in predict.read() if row.fields["id"] == "P116")
    for name, value in (("moe_layers_on_cpu", "8"), ("bits_per_expert_weight", "3"), ("dram_gb_s", "100")):
        assert replace(row, fields={**row.fields, name: value}).step_s(0.5) < row.step_s(0.5)


def test_a_model_without_a_shape_is_named(predict):
    with pytest.raises(ConfigError, match="X1: model 'dream' has no shape, expected one of deepseek-ai"):
        predict.Row({"id": "X1", "model": "dream"})
