"""Programs, machines and step sizes at random, as hypothesis draws them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import strategies as st

from hybridlab.lowering import Planner
from hybridlab.plans import EXCHANGES, ExpertPath, Move, PlacementPlan, Program, StepPlan, Tier
from hybridlab.routing import RoutingStats
from hybridlab.simulator.cost_model import Micro
from hybridlab.simulator.machine import Machine, load_profile
from hybridlab.simulator.shapes import ModelShape
from hybridlab.spec import HardwareSpec, ModelSpec
from hybridlab.strategies.checks import TOY_GPU, TOY_MODEL
from hybridlab.strategies.registry import resolve

MODEL = replace(TOY_MODEL, num_layers=12)
SHAPE = ModelShape.of(MODEL)
# A toy model's ops take nanoseconds on a real machine: these rates make their bytes as long as what is fixed.
SLOW = replace(
    load_profile("rtx5090_2x_epyc9355").machine,
    host_peak_gb_s=2.0, cpu_tflops=0.05, gpu_read_gb_s=4.0, gpu_tflops=0.2, link_gb_s=0.5, net_gb_s=0.5,
    gpu_flop_efficiency=0.6, gpu_attention_efficiency=0.6, gpu_op_us=10.0, cpu_expert_us=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class Fixed:
    """A placement that is what it is given."""

    plan: PlacementPlan
    path: ExpertPath

    def place(self, model: ModelSpec, hardware: HardwareSpec, routing: RoutingStats) -> PlacementPlan:
        return self.plan

    def expert_path(self, num_tokens: int, placed: PlacementPlan, hardware: HardwareSpec) -> ExpertPath:
        return self.path

    def update(self, routing: RoutingStats) -> tuple[Move, ...]:
        return ()


def planned(plan: PlacementPlan, path: ExpertPath, overlap: str, step: StepPlan, model: ModelSpec = MODEL) -> Program:
    planner = Planner(model, TOY_GPU, Fixed(plan, path), resolve("overlap", overlap), plan, ranks=(0, 1))
    return planner.program(planner.shape("main", step))


@st.composite
def programs(draw, *, model: ModelSpec = MODEL, ranks: int = 2) -> Program:
    """Any tiers (the same ones in each layer, or not), paths, overlaps, and up to `ranks` ranks."""
    tiers = [draw(st.sampled_from(list(Tier))) for _ in range(model.num_experts)]
    tier_of = {(layer, e): tier for layer in model.moe_layers for e, tier in enumerate(tiers)}
    if draw(st.booleans()):
        tier_of[draw(st.sampled_from(model.moe_layers)), 0] = draw(st.sampled_from(list(Tier)))
    both = draw(st.integers(1, ranks)) == 2
    rank_of = {(layer, e): e % 2 for layer in model.moe_layers for e in range(model.num_experts)} if both else {}
    parts, slots, exchange = draw(st.integers(1, 3)), draw(st.integers(3, 7)), draw(st.sampled_from(EXCHANGES))
    plan = PlacementPlan(Tier.HOST, tier_of, rank_of, slots, parts, exchange)
    prefetch = draw(st.sampled_from([None, (), (frozenset({0, 3, 5}),) * model.num_layers]))
    path = ExpertPath(prefetch, draw(st.sampled_from([0, 2])))
    overlap = draw(st.sampled_from(["sequential", "prefetch", "dual_batch"]))
    step = StepPlan("decode", {"a": 1, "b": 1, "c": 1}, ranks=(0, 1) if both else (0,))
    return planned(plan, path, overlap, step, model)


@st.composite
def machines(draw) -> Machine:
    def rate(value: float) -> float:
        return value * draw(st.floats(0.2, 5.0))

    names = ("host_peak_gb_s", "cpu_tflops", "gpu_read_gb_s", "gpu_tflops", "link_gb_s", "net_gb_s")
    changed = {name: rate(getattr(SLOW, name)) for name in names}
    return replace(SLOW, **changed, host_shared_ratio=draw(st.floats(1.0, 1.5)))


micros = st.builds(lambda n, context: Micro.decode(float(n), float(context)), st.integers(1, 300), st.integers(0, 5000))
