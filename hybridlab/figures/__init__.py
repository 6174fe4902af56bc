"""Figures: DataFrame -> Axes. Every function takes `ax=None` and returns the Axes it drew on.

Rows of several kinds of evidence are compared only if `evidence=[...]` asks for it.
"""

from hybridlab.calibration.files import read_calibration
from hybridlab.figures.agreement import configuration_map, predicted_measured
from hybridlab.figures.crossover import crossover, save_calibration
from hybridlab.figures.decode_tradeoff import decode_table, decode_tradeoff, read_decode
from hybridlab.figures.draw import draw_figures
from hybridlab.figures.exchange import dslp, exchange_bytes, exchange_table, read_exchange
from hybridlab.figures.fp8_codes import fp8_codes, fp8_table
from hybridlab.figures.interference import claim_table, interference, interference_table, read_interference
from hybridlab.figures.kernel_bench import read_kernel_bench, save_kernel_bench
from hybridlab.figures.latency_cdf import latency_cdf
from hybridlab.figures.load_curves import load_curves
from hybridlab.figures.pareto import pareto_front
from hybridlab.figures.perfetto import save_perfetto
from hybridlab.figures.roofline import roofline, weights_rate
from hybridlab.figures.save import save_figure
from hybridlab.figures.slp import read_slp, slp, slp_table
from hybridlab.figures.style import ONE_COLUMN_IN, TWO_COLUMNS_IN, style
from hybridlab.figures.tables import Tables
from hybridlab.figures.timeline import timeline
from hybridlab.figures.ttft_prompt_length import ttft_prompt_length
from hybridlab.figures.ttft_throughput import ttft_throughput
from hybridlab.figures.what_if import prefill_ways, upgrades
from hybridlab.figures.worker_timeline import worker_timeline

__all__ = [
    "ONE_COLUMN_IN",
    "TWO_COLUMNS_IN",
    "Tables",
    "claim_table",
    "configuration_map",
    "crossover",
    "decode_table",
    "decode_tradeoff",
    "draw_figures",
    "dslp",
    "exchange_bytes",
    "exchange_table",
    "fp8_codes",
    "fp8_table",
    "interference",
    "interference_table",
    "latency_cdf",
    "load_curves",
    "pareto_front",
    "predicted_measured",
    "prefill_ways",
    "read_calibration",
    "read_decode",
    "read_exchange",
    "read_interference",
    "read_kernel_bench",
    "read_slp",
    "roofline",
    "save_calibration",
    "save_figure",
    "save_kernel_bench",
    "save_perfetto",
    "slp",
    "slp_table",
    "style",
    "timeline",
    "ttft_prompt_length",
    "ttft_throughput",
    "upgrades",
    "weights_rate",
    "worker_timeline",
]
