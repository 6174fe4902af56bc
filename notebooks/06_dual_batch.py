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
# # Dual batch
#
# Decode with the experts in host memory: the GPU computes attention and the router of a layer, the CPU its experts, and
# the next layer's attention needs what they gave. So one of both always waits. A dual batch cuts the requests of a step
# into two microbatches: while the CPU computes the experts of one, the GPU computes the attention of the other.
#
# If all goes well, a step takes as long as the busier of the two. But what both microbatches need is read twice: the
# weights of attention, and the experts that both chose. A plain batch reads them once. So the question is not whether a
# dual batch is faster than one request after the other, but whether it is faster than a plain batch of the same
# requests.
#
# The first part runs here, on cores of which some take the GPU's place. The second one shows what was measured and
# kept. It takes about half a minute.

# %%
import tempfile

import hybridlab as hl
from hybridlab.bench.decode_devices import decode
from hybridlab.config import project_dir

folder = tempfile.TemporaryDirectory()
checkpoint = f"{folder.name}/qwen3-7b-a1b, 4 layers"
model = hl.make_checkpoint(checkpoint, "qwen3-7b-a1b", layers=4, progress=False)

# %% [markdown]
# ## A layer under each overlap
#
# Two requests decode a few tokens, with the layers of Qwen3-30B-A3B's size, four of them. `device="emulated"` gives
# half of the cores the place of a GPU.

# %%
config = {
    "experiment": "dual_batch_emulated",
    "model": {"path": checkpoint},
    "workload": {"kind": "offline", "num_requests": 2, "prompt_tokens": 64, "output_tokens": 8},
    "engine": {"device": "emulated", "kv_tokens": 256},
    "placement": "all_host",
    "scheduler": "fcfs",
    "sweep": {"overlap": ["sequential", "prefetch", "dual_batch"]},
}
result = hl.run(config, progress=False)
result.summary[["overlap", "median_tpot_s", "output_tokens_per_s", "evidence"]].round(3)

# %% [markdown]
# A few steps on shared cores: look at the timelines, not at the seconds. Each shows the last step, from the embedding
# to the head.

# %%
run_ids = result.summary["run_id"]
begins_s = result.spans[result.spans["kind"] == "embed"].groupby("run_id")["start_s"].max()

# %% [markdown]
# ### Sequential and prefetch
#
# Each op of `sequential` waits for the one before it. `prefetch` lets all lanes run as far ahead as they can, but there
# is nothing to run ahead with: no expert is loaded, and attention and experts of one batch need each other in turns.

# %%
ax = hl.figures.timeline(result, where={"run_id": run_ids[0]}, start_s=begins_s[run_ids[0]])

# %%
ax = hl.figures.timeline(result, where={"run_id": run_ids[1]}, start_s=begins_s[run_ids[1]])

# %% [markdown]
# ### Dual batch
#
# The same two requests as two microbatches; the second one is hatched. The CPU has work from the first router on, and
# what remains of waiting is where one lane takes longer than the other. The head computes both in one go behind the
# last experts: with four layers that is much of a step, with the 48 of the model it is little.

# %%
ax = hl.figures.timeline(result, where={"run_id": run_ids[2]}, start_s=begins_s[run_ids[2]])

# %% [markdown]
# ## Does it pay here?
#
# `hl.calibrate` measures both on this machine: dual batch is used from the number of requests on from which it is
# faster, and never where it is not. Here half of the cores are a GPU, and both lanes read the same memory: there is
# little to gain. With a GPU, attention reads memory of its own.

# %%
measured = hl.calibrate(
    checkpoint, "emulated", layers=4, max_tokens=1, requests=[2, 4, 8], depth=64, save=False, progress=False
)
ax = hl.figures.crossover(measured, kind="decode")

# %% [markdown]
# ## What the users see
#
# More requests in a step give more tokens per second, and each user waits longer for the next one. A point is a number
# of requests; all points of the same number lie on a grey line, and further up on it is better in both.

# %%
here = decode(
    checkpoint=checkpoint, device="emulated", batch=[1, 2, 4, 8], depth=64, steps=8, beside_cpu=True, progress=False
)
ax = hl.figures.decode_tradeoff(here.rows, evidence=["emulated", "measured"])

# %% [markdown]
# ## What was measured elsewhere
#
# All runs in `results/paper/dual_batch`, each with its machine; `experiments/dual_batch` says how they were made.
# `fraction` is the bound over the time of a step: the busier lane's ops, and what cannot overlap. `gain` is against the
# plain batch of as many requests.

# %%
stored = hl.figures.read_decode()
stored[["file", "machine", "preset", "code"]].drop_duplicates()

# %%
hl.figures.decode_table(stored).drop(columns=["machine", "code"]).round(3)

# %% [markdown]
# ### On one H100
#
# A model of the size of Qwen3-30B-A3B, its experts on 16 virtual cores, attention on the GPU, 1,024 tokens in each
# cache. The dual batch gains 2% with two requests and takes longer than the plain one with more: the experts take 4 to
# 18 times as long as attention, so that there is little to hide, and two microbatches make them 12 to 16% longer. It is
# as near its own bound as the plain batch is to its own, so that no better order would help. At depth 8192 (in the
# table) it is much the same.

# %%
ax = hl.figures.decode_tradeoff(stored, where={"device": "cuda", "depth": 1024})

# %% [markdown]
# `hybridlab calibrate` finds it as well. It says "never", and `dual_batch` then runs as a plain batch on that machine.

# %%
calibration = hl.figures.read_calibration(project_dir() / "results/paper/crossover/calibration.json")
ax = hl.figures.crossover(calibration, kind="decode")
