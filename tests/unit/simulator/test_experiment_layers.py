"""experiments/layer_profiles: kernel times from a datasheet, and what the tiles of attention say."""

from __future__ import annotations

import importlib.util
import sys
from math import isfinite
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "experiments" / "layer_profiles" / "predict.py"


@pytest.fixture(scope="module")
def predict():
    spec = importlib.util.spec_from_file_location("layer_predict", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layer_predict"] = module
    spec.loader.exec_module(module)
    return module


def test_layers_are_predicted_from_the_datasheet_within_a_quarter(predict):
    found = list(predict.rows(every=20))
    assert all(isfinite(each.predicted_us) and each.predicted_us > 0 for each in found)
    median = {kind: absolute for kind, _, absolute, _, _ in predict.summary(found)}
    assert set(median) >= {"moe", "projections", "attention: prefill", "attention: decode", "attention: mixed"}
    assert all(error < 0.25 for error in median.values()), median


def test_nothing_of_the_rows_is_an_input(predict):
    assert (predict.MACHINE.gpu_attention_efficiency, predict.MACHINE.gpu_flop_efficiency) == (0.6, 0.6)
    assert (predict.MACHINE.gpu_read_gb_s, predict.MACHINE.gpu_tflops) == (1597.0, 500.0)


def test_few_rows_take_as_long_as_a_tile_and_waves_are_whole(predict):
    assert predict.tiles_s([4096]) == pytest.approx(predict.tiles_s([4096] * 5))  # 32 heads x 5 tiles: 160 of 188 SMs
    assert predict.tiles_s([4096] * 6) == pytest.approx(2 * predict.tiles_s([4096]))
    assert predict.attention_us(16, 4096, 0, 0) == pytest.approx(predict.attention_us(64, 4048, 0, 0))


def test_what_l2_keeps_is_read_once(predict):
    small, large = 4 * predict.L2_BYTES, 4e3 * predict.L2_BYTES
    assert predict.repeated_reads_s(small) == pytest.approx(small / predict.GPU_BYTES_S)
    assert predict.repeated_reads_s(large) == pytest.approx(8 * large / predict.GPU_BYTES_S, rel=0.01)
