"""Errors that a user can cause, each rendered as one line (notebook and stderr)."""

from __future__ import annotations


class HybridlabError(Exception):
    """Base of every error caused by input: it names the file, key, tensor or object, and what was expected."""

    def _render_traceback_(self) -> list[str]:
        # IPython calls this instead of printing a traceback from deep inside.
        return [f"{type(self).__name__}: {self}"]


class CheckpointError(HybridlabError):
    """A checkpoint folder, file, key or tensor is missing, malformed or unsupported."""


class ConfigError(HybridlabError):
    """A configuration file, key or value is wrong."""


class KernelError(HybridlabError):
    """A kernel tier was asked for that this machine or build cannot run."""


class MemoryBudgetError(HybridlabError):
    """What was asked for does not fit the memory budget; the message carries the numbers."""


class PlanError(HybridlabError):
    """A program cannot run: a cycle, an unknown need, an unpaired collective, an overused ring slot."""


class RequestError(HybridlabError):
    """A request can never be served: token out of range, prompt longer than the cache, bad limits."""


class StrategyError(HybridlabError):
    """A strategy returned something that its contract forbids."""


class WeightsError(HybridlabError):
    """Weights that are shared between processes cannot be used: not filled, damaged, or of another checkpoint."""


class WorkerLost(HybridlabError):
    """A worker computes no more (its process was killed, its GPU gave up), and what it held is gone."""
