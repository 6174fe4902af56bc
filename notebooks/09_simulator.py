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
# # The simulator
#
# A strategy gives a plan. The engine runs it on real devices, the simulator on a clock: the same program, with the time
# that a cost model gives to each op. Three questions: does it agree with the engine on this machine, does it agree with
# what others have published of theirs, and what can one ask it that nobody can measure?
#
# ## This machine, measured
#
# `measure_profile` (on the command line: `hybridlab calibrate CHECKPOINT --profile FILE`) runs steps of the real
# engine, takes the time of each op, and fits the parameters of a machine to them. Each comes with a 95% interval. Here
# with the layers of Qwen3-30B-A3B's size, two of them, on the CPU alone.

# %%
import tempfile

import pandas as pd

import hybridlab as hl
from hybridlab.agreement import Load, agreement_rows
from hybridlab.config import project_dir
from hybridlab.simulator.configurations import configuration_rows
from hybridlab.simulator.machine import load_profile
from hybridlab.simulator.shapes import public_models

folder = tempfile.TemporaryDirectory()
checkpoint = f"{folder.name}/qwen3-7b-a1b, 2 layers"
model = hl.make_checkpoint(checkpoint, "qwen3-7b-a1b", layers=2, progress=False)
profile = hl.measure_profile(checkpoint, "cpu", layers=2, progress=False)
profile

# %% [markdown]
# ## Predicted beside measured
#
# Loads that the fit has not seen, served by both. If other programs compute here at the same time, the points scatter:
# a measurement between two reads of memory that differ by more than 10% is repeated, and in the end left out.

# %%
loads = [Load(1, 100), Load(3, 100), Load(6, 50), Load(1, 300), Load(2, 200)]
rows = pd.DataFrame(agreement_rows(checkpoint, profile.machine, loads))
rows.drop(columns=["device", "strategy"]).round(4)

# %% [markdown]
# Below: what was measured on two quiet cores with `experiments/agreement`, over strategies, loads and links, where
# that is stored; else the rows above.

# %%
stored = project_dir() / "results" / "paper" / "agreement" / "steps.csv"
ax = hl.figures.predicted_measured(pd.read_csv(stored) if stored.exists() else rows)

# %% [markdown]
# ## What others published
#
# `experiments/paper` predicts every published row on the profile of the paper's machine. No row was used as an input.
# Where `side` is not "both", the published number is a bound.

# %%
published = pd.read_csv(project_dir() / "results" / "paper" / "paper" / "predictions.csv")
columns = ["what", "unit", "published", "side", "predicted", "error"]
published[columns].style.format({"published": "{:g}", "predicted": "{:.3g}", "error": "{:+.0%}"}).hide()

# %% [markdown]
# ## A hundred thousand configurations
#
# Qwen3-235B-A22B, prompts of 2,048 tokens: 25,000 machines between a desktop and a server, each under four strategies,
# with 2 to 16 requests that decode together. Each configuration is a whole prefill and a whole decode step. A machine
# is a point, coloured by what is the fastest on it. Streamed experts have a floor, their size over the link; the CPU's
# take the time of their products. A dual batch reads experts twice that a plain batch reads once, so that it wins only
# where attention takes about as long as the experts do.

# %%
machine = load_profile("rtx5090_2x_epyc9355").machine
spec, shape = public_models()["Qwen/Qwen3-235B-A22B"]
configurations = pd.DataFrame(configuration_rows(machine, spec, shape, 25_000))
ax = hl.figures.configuration_map(configurations)

# %%
configurations.groupby("strategy", sort=False)[["ttft_s", "tpot_s", "output_tokens_per_s"]].median().round(2)

# %%
folder.cleanup()
