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
# # TTFT against throughput
#
# How soon does the first token come, and how many tokens a second does the machine deliver? One can be had at the
# cost of the other. Here two schedulers are swept over the size of their chunks and over the load, on the engine;
# then the results are drawn, and explored in a panel. It takes about half a minute on two cores.
#
# The model is tiny, its weights are random, and runs are short. Read the shape of the figures, not the numbers.

# %%
import tempfile

import hybridlab as hl

# %% [markdown]
# ## The question, as a config
#
# A `sweep` lists what varies; its keys are those of the config, with dots. Each combination is a point: here two
# schedulers x two chunks x three loads. The load is how many times faster than recorded the requests arrive. Each
# point is measured twice.

# %%
folder = tempfile.TemporaryDirectory()
checkpoint = f"{folder.name}/tiny"
hl.make_checkpoint(checkpoint, "tiny", dtype="fp8", seed=0, progress=False)

config = {
    "experiment": "sweep_ttft_throughput",
    "model": {"path": checkpoint},
    "workload": {
        "kind": "azure",
        "path": "experiments/data/azure_2023_code_slice.csv",
        "num_requests": 12,
        "length_scale": 10.0,  # prompts of up to 500 tokens
        "output_length_scale": 1.0,
        "max_output_tokens": 24,
    },
    "engine": {"device": "cpu", "token_budget": 2048},
    "slo": {"ttft_s": 0.1, "tpot_s": 0.02},
    "warmup_requests": 1,
    "repeats": 2,
    "sweep": {
        "scheduler": ["fcfs", "chunked_prefill"],
        "scheduler.chunk_tokens": [64, 256],
        "workload.rate_scale": [4, 12, 36],
    },
}

# %% [markdown]
# Before anything runs, the plan says what would: how many runs, how long they will take, how much memory and disk.

# %%
hl.plan(config)

# %% [markdown]
# ## The sweep
#
# `hl.sweep` measures one run at a time, for anything beside it would be in the numbers. Every run is kept as soon
# as it is done: interrupt it, and the next call goes on from there. These are a few of the columns, and the last six
# of the runs.

# %%
summary = hl.sweep(config, progress=False)
columns = ["scheduler", "workload.rate_scale", "repeat", "median_ttft_s", "median_tpot_s", "output_tokens_per_s"]
summary[columns].tail(6)

# %% [markdown]
# The plan now knows that all of it is there.

# %%
hl.plan(config)

# %% [markdown]
# ## The results
#
# `hl.results` reads the table back at any time, by the name of the experiment: one row per run, all metrics with
# their units, the axes of the sweep, machine, code and evidence. So figures need no run, and no config.

# %%
stored = hl.results("sweep_ttft_throughput")
stored.shape

# %%
ax = hl.figures.ttft_throughput(stored)

# %% [markdown]
# How to read it. Every line is one scheduler with one chunk, its points are the loads, from left to right as more
# is asked of it. Lower is a sooner first token, further right is more tokens a second. The black line is the Pareto
# front: no measured point is both sooner and faster than one on it. Below the dashed line the TTFT of the SLO is
# met; pale points miss the SLO, and a ring says that it is TPOT that they miss. The pale band is the range of the
# repeats: lines whose bands overlap have not been told apart.
#
# A median hides the slow requests. This is every request at the highest load: how many had their first token
# within this time.

# %%
everything = hl.run(config, progress=False)  # all is stored: this reads it, with the times of each request
ax = hl.figures.latency_cdf(everything, metric="ttft_s", where={"workload.rate_scale": 36})

# %% [markdown]
# ## Explore
#
# The panel shows what is stored, under controls: which figure, what the lines are, which runs, which percentile,
# which SLO. Set the figure to "latency CDF" and the latency to TPOT to see the other side: who computes whole prompts
# first lets those wait who are already reading. Goodput is counted anew for the limits that you set. "save figure"
# writes PDF, SVG and PNG at print size, and a JSON that names the runs and the call that gives this very panel again.
# The controls work while the notebook runs; elsewhere the panel is a picture.

# %%
hl.explore("sweep_ttft_throughput")
