"""Panels of ipywidgets: `explore` shows stored results. What is shown is data (`Choice`); the panel only sets it."""

from hybridlab.widgets.panel import Panel, explore

__all__ = ["Panel", "explore"]
