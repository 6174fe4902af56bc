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
# # Stream-loading prefill
#
# The experts of a large model do not fit a GPU. A long prompt can be computed there all the same: while the GPU works
# on one layer, the link brings the experts of the next one from host memory into a ring of a few slots, and every
# expert crosses the link once per prompt. If all goes well the shorter of the two, loading and computing, costs
# nothing: TTFT is max(the loads alone, the same prompt with all experts on the GPU). That is the floor below.
#
# The first part shows what was measured on a GPU, the second one runs here, on a machine without one. It takes a few
# seconds.

# %%
import hybridlab as hl
from hybridlab.config import project_dir

# %% [markdown]
# ## On one H100
#
# A model of the size of Qwen3-30B-A3B in FP8 with random weights, its 29 GB of experts in pinned host memory. The rows
# lie in `results/paper/slp` and come from `experiments/slp/gpu.py`.

# %%
rows = hl.figures.read_slp()
rows[["machine", "code"]].drop_duplicates()

# %%
table = hl.figures.slp_table(rows)
table.pivot(index="variant", columns="tokens", values="fraction").round(2)

# %% [markdown]
# Fractions of the floor: 1 is all that overlap can give. A ring of two layers has 0.96 and more at every length; 16K,
# where loading and computing take about equally long, is the hardest. With one buffer a layer's experts are loaded once
# the last ones were used, beside the next layer's attention: at 32K tokens that is long enough to lose nothing, at 16K
# it costs a third. `sequential` waits for every copy and every op. Two slots of half a layer take no more memory than
# one buffer and hide the link up to 8K, but compute more slowly: each half gathers all routes anew.

# %%
ax = hl.figures.slp(rows)

# %% [markdown]
# Up to 8K tokens the link decides: TTFT is the same for 512 tokens and for 8K, and only fewer bytes would lower it. At
# 16K both take about as long, at 32K computing decides, and a GPU with room for the experts of two layers is nearly as
# fast as one that holds them all. What the link itself needs is pinned memory: with pageable memory the same ring took
# 3.5 s at 16K (`experiments/slp/README.md`).
#
# ### From how many tokens on?
#
# Short prompts are faster with the experts on the CPU. `hybridlab calibrate` found from where streaming them pays on
# this machine, and where in between mixed steps do: half of the experts cross the link while the CPU computes the
# others.

# %%
calibration = hl.figures.read_calibration(project_dir() / "results/paper/crossover/calibration.json")
ax = hl.figures.crossover(calibration)

# %% [markdown]
# ## The same plans without a GPU
#
# `device="emulated"` gives some cores the place of a GPU, a thread copies for the link, and `link_gb_s` caps it. The
# cap is chosen here such that loading and computing take about equally long, where overlap has most to give. Three ways
# to compute one prompt of 1,024 tokens:

# %%
ring = {"name": "streamed", "stream_from_tokens": 1}
config = {
    "experiment": "slp_emulated",
    "model": {"preset": "tiny", "dtype": "fp8", "seed": 0},
    "workload": {"kind": "offline", "num_requests": 1, "prompt_tokens": 1024, "output_tokens": 1},
    "engine": {"device": "emulated", "link_gb_s": 0.3, "token_budget": 1024, "kv_tokens": 2048},
    "scheduler": "fcfs",
    "warmup_requests": 1,
    "sweep": {
        "list": [
            {"placement": {**ring, "ring_slots": 2}, "overlap": "sequential"},
            {"placement": {**ring, "ring_slots": 1}, "overlap": "prefetch"},
            {"placement": {**ring, "ring_slots": 2}, "overlap": "prefetch"},
        ]
    },
}
result = hl.run(config, progress=False)
result.summary[["placement", "overlap", "median_ttft_s", "evidence"]].round(3)

# %% [markdown]
# One repeat of a tiny model on shared cores: look at the timelines, not at the seconds. The plan of all three holds the
# same ops; what differs is what an op waits for.
#
# ### Sequential
#
# Nothing runs beside anything else. The first layer of this model is dense and streams nothing; each of the other three
# loads its experts, and only then computes them.

# %%
run_ids = result.summary["run_id"]
ax = hl.figures.timeline(result, where={"run_id": run_ids[0]}, start_s=0.0)

# %% [markdown]
# ### Prefetch, a ring of one slot
#
# The first load starts with the step. The next one waits until the experts in the only slot have been used, and then
# runs beside the next layer's attention.

# %%
ax = hl.figures.timeline(result, where={"run_id": run_ids[1]}, start_s=0.0)

# %% [markdown]
# ### Prefetch, a ring of two slots
#
# Now a load runs beside the experts of the layer before it as well. The first two loads wait for nothing but the link,
# the third one for the experts in the first slot to have been used.

# %%
ax = hl.figures.timeline(result, where={"run_id": run_ids[2]}, start_s=0.0)

# %% [markdown]
# On a GPU it is `hl.load(path, device="cuda", placement="streamed", overlap="prefetch", token_budget=32768)`: streams
# take the place of the threads, and the budget lets a prompt be one step. `experiments/slp/README.md` says what was
# measured and how, `docs/decisions/0010-stream-loading.md` why it is built this way and what is missing.
