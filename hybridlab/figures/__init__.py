"""Figures: DataFrame -> Axes. Every function takes `ax=None` and returns the Axes it drew on."""

from hybridlab.figures.save import save_figure
from hybridlab.figures.style import style
from hybridlab.figures.timeline import timeline
from hybridlab.figures.ttft_throughput import ttft_throughput

__all__ = ["save_figure", "style", "timeline", "ttft_throughput"]
