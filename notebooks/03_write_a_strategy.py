# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write a strategy
#
# One scheduler from idea to measured figure: what goes wrong without it, the idea, the class, a check that finds
# a mistake in it, and the comparison with what is built in. It takes about half a minute on two cores.
#
# The model is tiny, its weights are random, and each point is one short run that anything else on the machine
# disturbs. Read the shape of the figures, not the numbers.

# %%
import tempfile
from dataclasses import dataclass

import hybridlab as hl

# %%
folder = tempfile.TemporaryDirectory()
checkpoint = f"{folder.name}/tiny"
hl.make_checkpoint(checkpoint, "tiny", dtype="fp8", seed=0, progress=False)

config = {
    "experiment": "write_a_strategy",
    "model": {"path": checkpoint},
    "workload": {
        "kind": "azure",
        "path": "experiments/data/azure_2023_code_slice.csv",
        "num_requests": 20,
        "rate_scale": 6,
        "length_scale": 6.0,  # prompts of 10 to 900 tokens
        "output_length_scale": 1.0,
        "max_output_tokens": 24,
    },
    "engine": {"device": "cpu", "token_budget": 2048},
    "slo": "mlperf-r1-server",
    "warmup_requests": 1,
}

# %% [markdown]
# ## The problem
#
# `fcfs` computes whole prompts in order of arrival, and nobody decodes meanwhile. Somebody who is already reading
# an answer sees it stop whenever a prompt arrives. The measure of that is ITL, the gap between two tokens of one
# request.

# %%
fcfs = hl.run(config, scheduler="fcfs", progress=False)
fcfs.summary[["median_ttft_s", "median_itl_s", "p90_itl_s", "p99_itl_s", "output_tokens_per_s"]].round(3)

# %%
ax = hl.figures.latency_cdf(fcfs, metric="itl_s")

# %% [markdown]
# Most gaps are the time of one decode step. The last few are many times longer: prompts were computed in them.
#
# ## The idea
#
# `chunked_prefill` ends the stalls by decoding in every step, which makes every step of a long prompt dearer. But
# a reader does not notice a gap of a tenth of a second. So let prompts run, in chunks, as long as nobody has
# waited for a token longer than `stall_s`; then decode once for all who read, and go on.
#
# ## The class
#
# A scheduler sees the queue and returns a step: a role and how many tokens of which requests. All that it may know
# is in `hl.QueueView`: who waits with how much of a prompt left, who is running, the budget of tokens, the time,
# and when a decode last ended. It keeps no state; its fields are its settings, and can be swept. This is a draft.


# %%
@dataclass(frozen=True)
class BoundedStall:
    stall_s: float = 0.1
    chunk_tokens: int = 128

    def schedule(self, queue):
        late = queue.now_s - (queue.last_decode_s or 0.0) >= self.stall_s
        for r in queue.waiting[:1]:
            n = min(r.remaining_prompt, self.chunk_tokens, queue.token_budget)
            if not (queue.running and late):
                return hl.StepPlan("prefill", {r.id: n})
        return hl.StepPlan("decode", {r.id: 1 for r in queue.running[: queue.token_budget]})


# %% [markdown]
# ## The check
#
# `hl.check_scheduler` drives a scheduler through random queues, without a model: long and short prompts, small
# budgets, a small cache. Its clock goes 50 ms a step, so a long `stall_s` puts many steps between two decodes.

# %% tags=["raises-exception"]
hl.check_scheduler(BoundedStall(stall_s=1.0))

# %% [markdown]
# It is right, though no run of ours would have shown it: the tiny model has plenty of cache. A prompt needs room
# in the KV cache. When those who read hold all of it, the draft keeps asking for a prompt that cannot start, and
# those whose end would make room wait for their turn. So, while anybody decodes, a prompt must fit.


# %%
@dataclass(frozen=True)
class BoundedStall:
    stall_s: float = 0.1
    chunk_tokens: int = 128

    def schedule(self, queue):
        late = queue.now_s - (queue.last_decode_s or 0.0) >= self.stall_s
        for r in queue.waiting[:1]:
            n = min(r.remaining_prompt, self.chunk_tokens, queue.token_budget)
            if not queue.running or not (late or n > queue.free_kv_tokens):
                return hl.StepPlan("prefill", {r.id: n})
        return hl.StepPlan("decode", {r.id: 1 for r in queue.running[: queue.token_budget]})


# %%
hl.check_scheduler(BoundedStall(stall_s=1.0))

# %% [markdown]
# Silence: nothing is wrong. What the check does not ask is whether the idea is any good.
#
# ## The measurement
#
# An object goes where a name would stand, in `sweep` too. Two values of `stall_s` tell whether it does what it
# says.

# %%
chunked_prefill = {"name": "chunked_prefill", "chunk_tokens": 64}
schedulers = ["fcfs", chunked_prefill, BoundedStall(), BoundedStall(stall_s=0.05)]
sweep = config | {"sweep": {"scheduler": schedulers, "workload.rate_scale": [3, 6]}}
hl.plan(sweep)

# %%
everything = hl.run(sweep, progress=False)
everything.summary.pivot(
    index="scheduler", columns="workload.rate_scale", values=["p99_itl_s", "median_ttft_s", "output_tokens_per_s"]
).round(3)

# %%
ax = hl.figures.latency_cdf(everything, metric="itl_s", where={"workload.rate_scale": 6})

# %% [markdown]
# The marks on each curve are its median, p90 and p99. The longest gaps of `fcfs` are as long as the prompts that
# arrived; those of `BoundedStall` end a little above its `stall_s`, for the chunk that is being computed when the
# time is over must still end. That is the promise, kept. `chunked_prefill` has no long gaps either, but no short
# ones while prompts are there: each of its steps carries a chunk.

# %%
ax = hl.figures.ttft_throughput(everything)

# %% [markdown]
# What it costs is here: lower is a faster first token, further right is more throughput, and the black line is the
# front that no other point beats. A scheduler that lies on the front at some load is worth having there. Before
# you believe a difference as small as these, measure each point several times (`"repeats": 5`); the figure then
# shows the range.
#
# ## Where it goes
#
# Nothing needs to be registered. Put the class into a module of yours that Python can import, say
# `my_lab/schedulers.py`, and name it in any config:
#
# ```yaml
# scheduler: {class: "my_lab.schedulers:BoundedStall", stall_s: 0.05}
# ```
#
# The same mapping works in `hl.run`, in the checks and in `sweep`. Here with a class that is there already:

# %%
hl.check_scheduler({"class": "hybridlab.strategies.scheduler.chunked_prefill:ChunkedPrefill", "chunk_tokens": 64})

# %% [markdown]
# The source of a strategy is kept with its runs, and the id of a run depends on it: a changed class is measured
# anew, an unchanged one is read from the store. Placements and overlaps are written, checked and swept the same way.
# CONTRIBUTING.md says how a strategy becomes part of hybridlab.
