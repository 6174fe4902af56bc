"""What is asked of the system: arrivals and lengths of requests, from traces or from distributions, and their ids.

One file per kind; `kinds.py` lists them.
"""

from hybridlab.workload.kinds import WORKLOAD_KINDS, Workload
from hybridlab.workload.requests import content_hash, load_rows, make_requests, warmup_requests
from hybridlab.workload.table import workload_table

__all__ = [
    "WORKLOAD_KINDS",
    "Workload",
    "content_hash",
    "load_rows",
    "make_requests",
    "warmup_requests",
    "workload_table",
]
