"""The workloads that a config may name. A new kind is a file of its own and an entry here."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from hybridlab.workload.azure import AzureWorkload
from hybridlab.workload.burstgpt import BurstGPTWorkload
from hybridlab.workload.closed_loop import ClosedLoopWorkload
from hybridlab.workload.conversation import ConversationWorkload
from hybridlab.workload.gamma import GammaWorkload
from hybridlab.workload.mooncake import MooncakeWorkload
from hybridlab.workload.offline import OfflineWorkload
from hybridlab.workload.poisson import PoissonWorkload
from hybridlab.workload.servegen import ServeGenWorkload

Workload = Annotated[
    AzureWorkload
    | BurstGPTWorkload
    | MooncakeWorkload
    | ServeGenWorkload
    | PoissonWorkload
    | GammaWorkload
    | OfflineWorkload
    | ClosedLoopWorkload
    | ConversationWorkload,
    Field(discriminator="kind"),
]
WORKLOAD_KINDS: tuple[str, ...] = tuple(
    get_args(section.model_fields["kind"].annotation)[0] for section in get_args(get_args(Workload)[0])
)
