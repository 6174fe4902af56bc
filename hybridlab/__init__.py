"""hybridlab: a lab for Mixture-of-Experts inference with CPU and GPU together.

```python
import hybridlab as hl
engine = hl.load(path)
engine.generate([1, 2, 3], max_tokens=24)
result = hl.run("experiments/quickstart/config.yaml")
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Imported when first used: torch and pandas take seconds, `import hybridlab` must not.
_PUBLIC = {
    "Engine": "hybridlab.session",
    "load": "hybridlab.loading",
    "calibrate": "hybridlab.calibration.steps",
    "measure_profile": "hybridlab.calibration.profile",
    "load_profile": "hybridlab.simulator.machine",
    "explore": "hybridlab.widgets",
    "run": "hybridlab.experiment",
    "sweep": "hybridlab.experiment",
    "plan": "hybridlab.sweep_plan",
    "tune": "hybridlab.tuning.search",
    "load_config": "hybridlab.config",
    "results": "hybridlab.store",
    "export_results": "hybridlab.export",
    "check_scheduler": "hybridlab.strategies.checks",
    "check_placement": "hybridlab.strategies.checks",
    "check_overlap": "hybridlab.strategies.checks",
    "doctor": "hybridlab.hardware.doctor",
    "make_checkpoint": "hybridlab.checkpoint.writer",
    "open_checkpoint": "hybridlab.checkpoint",
    "HybridlabError": "hybridlab.errors",
    "ExpertPath": "hybridlab.plans",
    "Move": "hybridlab.plans",
    "Op": "hybridlab.plans",
    "PlacementPlan": "hybridlab.plans",
    "QueueView": "hybridlab.plans",
    "StepPlan": "hybridlab.plans",
    "Tier": "hybridlab.plans",
    "Request": "hybridlab.request",
    "Sampling": "hybridlab.request",
    "HardwareSpec": "hybridlab.spec",
    "ModelSpec": "hybridlab.spec",
    "RoutingStats": "hybridlab.routing",
    "hit_rate": "hybridlab.routing",
    "record_routing": "hybridlab.recording",
    "workload_table": "hybridlab.workload",
}

__all__ = [*_PUBLIC, "__version__", "figures"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "figures":  # matplotlib takes a second
        return importlib.import_module("hybridlab.figures")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hybridlab' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from hybridlab import figures as figures
    from hybridlab.calibration.profile import measure_profile as measure_profile
    from hybridlab.calibration.steps import calibrate as calibrate
    from hybridlab.checkpoint import open_checkpoint as open_checkpoint
    from hybridlab.checkpoint.writer import make_checkpoint as make_checkpoint
    from hybridlab.config import load_config as load_config
    from hybridlab.errors import HybridlabError as HybridlabError
    from hybridlab.experiment import run as run
    from hybridlab.experiment import sweep as sweep
    from hybridlab.export import export_results as export_results
    from hybridlab.hardware.doctor import doctor as doctor
    from hybridlab.loading import load as load
    from hybridlab.plans import ExpertPath as ExpertPath
    from hybridlab.plans import Move as Move
    from hybridlab.plans import Op as Op
    from hybridlab.plans import PlacementPlan as PlacementPlan
    from hybridlab.plans import QueueView as QueueView
    from hybridlab.plans import StepPlan as StepPlan
    from hybridlab.plans import Tier as Tier
    from hybridlab.recording import record_routing as record_routing
    from hybridlab.request import Request as Request
    from hybridlab.request import Sampling as Sampling
    from hybridlab.routing import RoutingStats as RoutingStats
    from hybridlab.routing import hit_rate as hit_rate
    from hybridlab.session import Engine as Engine
    from hybridlab.spec import HardwareSpec as HardwareSpec
    from hybridlab.spec import ModelSpec as ModelSpec
    from hybridlab.store import results as results
    from hybridlab.strategies.checks import check_overlap as check_overlap
    from hybridlab.strategies.checks import check_placement as check_placement
    from hybridlab.strategies.checks import check_scheduler as check_scheduler
    from hybridlab.sweep_plan import plan as plan
    from hybridlab.tuning.search import tune as tune
    from hybridlab.widgets import explore as explore
    from hybridlab.workload import workload_table as workload_table
