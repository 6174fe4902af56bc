"""Published decode speeds of other engines from datasheet bandwidths and one efficiency for each engine.

python experiments/published_decode/predict.py [DATA.csv] [--out OUT.csv]

Each group of rows (engine, model, memory) is predicted with the efficiency of the engine's other groups.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, log
from pathlib import Path
from statistics import fmean, median

from hybridlab.errors import ConfigError
from hybridlab.plans import Tier
from hybridlab.simulator.cost_model import Micro, OpClass, cost_model, handoffs_s
from hybridlab.simulator.machine import Machine
from hybridlab.simulator.routes import Routes
from hybridlab.simulator.shapes import public_models

DATA = Path(__file__).parents[1] / "data" / "published_decode.csv"
ENOUGH = 1e9  # of what does not bound a token at batch 1: memory in GB, TFLOP/s


@dataclass(frozen=True, eq=False)
class Row:
    """A published figure. `fields` are the file's columns as text. Raises ConfigError for a model without a shape."""

    fields: dict[str, str]

    def __post_init__(self) -> None:
        if self.fields["model"] not in public_models():
            known = ", ".join(public_models())
            raise ConfigError(
                f"{self.fields['id']}: model {self.fields['model']!r} has no shape, expected one of {known}"
            )

    def number(self, name: str, default: float = 0.0) -> float:
        return float(self.fields[name] or default)

    @property
    def engine(self) -> str:
        return self.fields["engine"]

    @property
    def group(self) -> tuple[str, ...]:
        """Engine, model, and the host's memory and link that its experts come from."""
        return tuple(self.fields[name] for name in ("engine", "model", "dram_gb_s", "pcie_gb_s"))

    @property
    def published(self) -> float:
        return self.number("decode_tok_s")

    def step_s(self, efficiency: float) -> float:
        """Seconds of a token at batch 1 if every memory and link gives this share of its datasheet rate.

        One op after another, in the simulator's times: nothing overlaps at batch 1.
        """
        spec, shape = public_models()[self.fields["model"]]
        spec = replace(spec, top_k=int(self.number("top_k_override", spec.top_k)))
        expert_bits, dense_bits = self.number("bits_per_expert_weight"), self.number("bits_per_dense_weight")
        shape = replace(shape.with_bits(expert_bits, dense_bits), head_bits=dense_bits)
        machine = Machine(
            host_memory_gb=ENOUGH,
            host_peak_gb_s=self.number("dram_gb_s", ENOUGH),
            host_read_efficiency=efficiency,
            cpu_cores=1,
            cpu_tflops=ENOUGH,
            gpu_memory_gb=ENOUGH,
            gpu_read_gb_s=self.number("gpu_gb_s", ENOUGH),
            gpu_read_efficiency=efficiency,
            gpu_tflops=ENOUGH,
            link_gb_s=self.number("pcie_gb_s", ENOUGH) * efficiency,
        )
        cost = cost_model(machine, shape, [Micro.decode(1.0, self.number("context_tokens"))])
        no_gpu = self.fields["kind"] == "cpu_only"
        every = range(spec.num_experts)
        routes, layer = Routes(spec), spec.moe_layers[0]

        def op_s(kind: str, on_cpu: bool = no_gpu) -> float:
            return float(cost(OpClass(kind, on_cpu, 0)).alone_s)

        def experts_s(on_cpu: bool) -> float:
            chosen = routes.chosen(layer, every, frozenset(), 0, Tier.HOST if on_cpu else Tier.RESIDENT)
            return float(cost(OpClass("experts", on_cpu, 0, chosen=chosen)).alone_s)

        moe = len(spec.moe_layers)
        on_host = moe if no_gpu else int(self.number("moe_layers_on_cpu"))
        total = op_s("embed") + op_s("head") + spec.num_layers * op_s("attention")
        total += len(spec.dense_layers) * op_s("mlp") + moe * (op_s("router") + op_s("combine"))
        total += on_host * experts_s(True) + (moe - on_host) * experts_s(no_gpu)
        if not no_gpu:
            total += on_host * sum(handoffs_s(machine)[1:3])
        if self.fields["kind"] == "fetch":  # the note begins with how many experts cross the link for a token
            each = int(self.fields["note"].split()[0]) / moe
            total += moe * float(cost(OpClass("load", False, 0, each)).alone_s)  # type: ignore[arg-type]
        return total

    @cached_property
    def efficiency(self) -> float:
        """The share at which the published figure comes out; above 1 if it is more than the datasheets allow."""
        low, high = log(1e-4), log(1e2)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.step_s(exp(middle)) * self.published > 1 else (low, middle)
        return exp(low)


def read(path: Path = DATA) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(fields) for fields in csv.DictReader(file)]


def engine_efficiency(rows: Sequence[Row]) -> float:
    return exp(fmean(log(row.efficiency) for row in rows))


def held_out(rows: Sequence[Row], row: Row) -> float:
    """The efficiency to predict `row` with: of its engine's other groups, or of all other groups if it has none."""
    others = [each for each in rows if each.group != row.group]
    return engine_efficiency([each for each in others if each.engine == row.engine] or others)


def table(rows: Sequence[Row]) -> list[dict[str, str | float]]:
    found: list[dict[str, str | float]] = []
    for row in rows:
        used = held_out(rows, row)
        predicted = 1 / row.step_s(used)
        about: dict[str, str | float] = {name: row.fields[name] for name in ("id", "engine", "model", "kind")}
        about |= {"efficiency": used, "published": row.published, "predicted": predicted}
        found.append(about | {"error": predicted / row.published - 1, "evidence": "simulated"})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", type=Path, default=DATA)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    try:
        rows = read(given.data)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    found = table(rows)
    for each in found:
        print(
            f"{each['id']:<6}{each['engine']:<20}{each['model']:<30}{each['kind']:<9}"
            f"{each['published']:>8.4g}{each['predicted']:>8.3g}{each['error']:>+7.0%}"
        )
    for engine in dict.fromkeys(row.engine for row in rows):
        mine = [row for row in rows if row.engine == engine]
        errors = [abs(float(each["error"])) for each in found if each["engine"] == engine]
        print(f"{engine:<20} {len(mine):>3} rows: efficiency {engine_efficiency(mine):.2f}, error {median(errors):.0%}")
    errors = [abs(float(each["error"])) for each in found]
    print(f"{len(errors)} rows, each group held out: median absolute error {median(errors):.1%}")
    if given.out:
        with given.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
