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
# # A tour of hybridlab
#
# Load a Mixture-of-Experts model, generate, serve requests under two schedulers, write a third in one cell,
# and compare them. All of it takes about half a minute on two cores.
#
# The model is tiny and its weights are random; sixteen requests are few. Look at how it is done, not at the
# numbers.

# %%
import tempfile
from dataclasses import dataclass

import hybridlab as hl

# %% [markdown]
# ## A model
#
# The checkpoint has the layout of Hugging Face: `config.json` and safetensors, here with FP8 weights. A real
# one (Qwen3-MoE) loads the same way. The weights stay in the file, which is mapped into memory; the table
# says what else is allocated.

# %%
folder = tempfile.TemporaryDirectory()
checkpoint = f"{folder.name}/tiny"
hl.make_checkpoint(checkpoint, "tiny", dtype="fp8", seed=0, progress=False)

engine = hl.load(checkpoint, quiet=True)
engine

# %% [markdown]
# Token ids in, token ids out. With a `tokenizer.json` beside the weights, a text works as well.

# %%
engine.generate([1, 2, 3], max_tokens=12)

# %%
engine.generate([1, 2, 3], max_tokens=12, temperature=0.8, seed=7)

# %%
engine.close()

# %% [markdown]
# ## An experiment
#
# A config says what is served by what. These are the keys of `experiments/quickstart/config.yaml`, smaller; a
# path to such a file works in the same place. Arrivals and lengths come from a recorded trace. `sweep` lists
# what varies: here the load, as how many times faster than recorded the requests arrive.

# %%
config = {
    "experiment": "tour",
    "model": {"path": checkpoint},
    "workload": {
        "kind": "azure",
        "path": "experiments/data/azure_2023_code_slice.csv",  # paths start at the project
        "num_requests": 16,
        "length_scale": 8.0,  # prompts of about 300 tokens instead of 2,300
        "output_length_scale": 1.0,  # outputs as recorded
        "max_output_tokens": 24,
    },
    "engine": {"device": "cpu", "token_budget": 2048},
    "slo": "mlperf-r1-server",
    "warmup_requests": 1,
    "sweep": {"workload.rate_scale": [3, 12]},
}
fcfs = hl.run(config, scheduler="fcfs", progress=False)
fcfs

# %% [markdown]
# One row per run, measured on the machine that ran this page. TTFT is the time from a request's arrival to its
# first token, TPOT the mean time of each further token; goodput counts the requests that keep both below the
# limits of the SLO. This is `fcfs.table`; `fcfs.summary` has all metrics, `fcfs.requests` the times of each
# request. Runs are kept under `results/`: a second call reads them from there, `force=True` measures again.
#
# ## Another scheduler
#
# `fcfs` computes whole prompts in order of arrival, and nobody decodes meanwhile. `chunked_prefill` cuts
# prompts into chunks and decodes beside them. A name is enough; a mapping sets its fields as well.

# %%
chunked_prefill = {"name": "chunked_prefill", "chunk_tokens": 128}
chunked = hl.run(config, scheduler=chunked_prefill, progress=False)
chunked.table.round(3)

# %% [markdown]
# ## Your own scheduler
#
# A scheduler sees the queue and says which requests compute how many tokens next. It decides; the engine
# acts. This one works in chunks too, but the shortest prompt comes first.


# %%
@dataclass(frozen=True)
class ShortestFirst:
    chunk_tokens: int = 128

    def schedule(self, queue):
        tokens = {r.id: 1 for r in queue.running[: queue.token_budget]}
        left = min(self.chunk_tokens, queue.token_budget - len(tokens))
        for r in sorted(queue.waiting, key=lambda r: r.remaining_prompt):
            if n := min(r.remaining_prompt, left):
                tokens[r.id] = n
                left -= n
        return hl.StepPlan("mixed", tokens)


# %% [markdown]
# The check drives it through random queues, without a model. Silence means that nothing is wrong.

# %%
hl.check_scheduler(ShortestFirst())

# %% [markdown]
# The object goes where the name stood. Of each request at the higher load: its prompt, how long it waited before
# it was first scheduled, TTFT and TPOT, all measured.

# %%
mine = hl.run(config, scheduler=ShortestFirst(), force=True, progress=False)
requests = mine.requests.query("`workload.rate_scale` == 12").set_index("request_id")
requests[["prompt_tokens", "queue_s", "ttft_s", "tpot_s"]].sort_values("prompt_tokens").round(3)

# %% [markdown]
# ## Compare
#
# A scheduler can be swept like anything else. All six runs are in the store by now, so this only reads them.

# %%
schedulers = ["fcfs", chunked_prefill, ShortestFirst()]
everything = hl.run(config | {"sweep": {"scheduler": schedulers, **config["sweep"]}}, progress=False)
everything.table.pivot(
    index="scheduler",
    columns="workload.rate_scale",
    values=["output_tokens_per_s", "median_ttft_s", "p99_ttft_s", "median_tpot_s"],
).round(3)

# %%
ax = hl.figures.ttft_throughput(everything)

# %% [markdown]
# Each line joins the loads of one scheduler. Markers are medians, whiskers reach to the 90th percentile; lower
# and further right is better. With the shortest prompt first, the median request waits less and long prompts
# wait more. Other programs easily disturb runs as short as these; `"repeats": 3` in the config measures each
# point three times, and the figure shows the range.
#
# ## Where the time goes
#
# The engine keeps the last steps of a run, op by op: on which lane each ran, from when to when. Without a GPU
# there is one lane. These are the last 50 ms under the new scheduler at the higher load: one step follows the
# other, each with attention, router and experts layer by layer.

# %%
ax = hl.figures.timeline(mine.spans.query("`workload.rate_scale` == 12"))
