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
# # What would your hardware do, and what should you buy?
#
# All of it is simulated: no checkpoint, no GPU, half a minute. A machine is a table of numbers, a model is its shape,
# and the programs are the ones that the engine would run. How far to believe it: `experiments/paper` and
# `experiments/published_decode` hold the same formulas against figures that others published (half of the errors are
# below 8% and below 16%), `experiments/layer_profiles` against kernels of a GPU.
#
# ## A machine
#
# Profiles come with hybridlab. Each number says where it is from; "assumed" means what it says.

# %%
from dataclasses import replace

import pandas as pd

import hybridlab as hl
from hybridlab.simulator.machine import load_profile, profile_names
from hybridlab.simulator.sensitivity import (
    decode_rows,
    machine_rows,
    prefill_rows,
    sensitivity_rows,
    upgrade_rows,
)
from hybridlab.simulator.shapes import public_models

profile = load_profile("rtx4090_desktop")
profile

# %% [markdown]
# Make it yours: `load_profile("mine.toml")` reads a file like those in `hybridlab/simulator/profiles`, and any number
# can be replaced.

# %%
mine = replace(profile.machine, host_memory_gb=192.0, host_peak_gb_s=96.0)

# %% [markdown]
# ## A model
#
# Qwen3-235B-A22B, 4.8 bits a weight (Q4_K_M). It takes this much memory, in GB: experts, everything else.

# %%
spec, shape = public_models()["Qwen/Qwen3-235B-A22B"]
shape = shape.with_bits(4.8)
pd.Series(shape.weight_bytes(spec), ["experts", "everything else"]).div(1e9).round(1)

# %% [markdown]
# ## How long until the first token?
#
# The VRAM holds the experts of some layers. For the others there are two ways: the CPU multiplies with them, or they
# cross the link while the GPU computes, layer by layer. The first grows with the prompt from the start. The second has
# a floor, their size over the link; it pays from where the lines cross.

# %%
lengths = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
prefill = pd.DataFrame(prefill_rows(mine, spec, shape, lengths))
ax = hl.figures.prefill_ways(prefill, goal_s=30)

# %% [markdown]
# ## How fast after that?
#
# Behind 4,096 tokens of context. More requests together read more experts, so that each waits longer.

# %%
pd.DataFrame(decode_rows(mine, spec, shape, [1, 2, 4, 8], 4096)).round(3)

# %% [markdown]
# ## What should I buy?
#
# One part at a time is doubled, and the fastest way is looked for anew. Decode waits for DRAM: twice the channels help,
# or VRAM for more layers. A prompt of 4,096 tokens waits for the link, and a longer one sooner or later for the GPU.

# %%
bought = pd.DataFrame(upgrade_rows(mine, spec, shape, prompt_tokens=4096, context_tokens=4096))
ax = hl.figures.upgrades(bought)

# %%
bought[["change", "prefill_way", "ttft_s", "tpot_s"]].round(3)

# %% [markdown]
# The other way to ask: by how many percent do TTFT and TPOT change if a number is one percent larger? These are
# derivatives of the simulator, so they hold as long as nothing else begins to bind. A parameter that is assumed and has
# a large one is worth measuring.

# %%
pd.DataFrame(sensitivity_rows(mine, spec, shape, prompt_tokens=4096, context_tokens=4096)).head(8).round(2)

# %% [markdown]
# ## Or another machine?
#
# The profiles that come with hybridlab, one GPU of each. `osdi26` is the paper's machine with what its engine is
# published to take for launches and barriers; the same machine without is what our assumptions make of it.

# %%
machines = pd.Series(profile_names(), index=profile_names()).map(lambda name: load_profile(name).machine)
rows = machine_rows(machines.to_dict(), spec, shape, prompt_tokens=4096, context_tokens=4096)
pd.DataFrame(rows).drop(columns="evidence").round(3)

# %% [markdown]
# ## What it does not know
#
# - **Sockets.** Two of them are one memory; engines get less of it than of one (`experiments/published_decode`).
# - **Prices, watts and noise.**
# - **Real routing.** Experts are chosen alike here, unless routes of your prompts are given (`hl.record_routing`): hot
#   experts make VRAM worth more than it is above.
# - **Queues.** TTFT is one prompt's, on an idle machine. `hl.run(config, backend="simulator")` serves a trace.
