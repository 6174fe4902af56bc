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
# # Two ranks, half of the experts each
#
# With expert parallelism every rank has a part of the experts, and a prompt whose experts are streamed crosses as many
# links as there are ranks. What it costs is that tokens must get to the experts that they chose, and the results back.
# There are three ways:
#
# - `small_ep`: every rank gets all hidden states, repeats the router for all tokens, and sends back one partial sum per
#   token. What travels is known before the router has chosen: (ranks - 1) x tokens rows, each way.
# - `dispatch_per_route`: a token goes to each of its top-k experts by itself.
# - `dispatch_per_rank`: a token goes once to each rank that has any of its experts.
#
# The model is tiny and its weights are random. Bytes are exact; of seconds look at which is longer, not at the numbers.
# It takes some ten seconds.

# %%
import tempfile

import hybridlab as hl
from hybridlab.bench.dslp import dslp
from hybridlab.bench.exchange import exchange_bytes

folder = tempfile.TemporaryDirectory()
checkpoint = f"{folder.name}/tiny"
model = hl.make_checkpoint(checkpoint, "tiny", dtype="fp8", seed=0, progress=False)

# %% [markdown]
# ## Bytes on the wire against theory
#
# A prompt of 256 tokens on 2, 4 and 8 ranks. One process computes it and tells which experts each token chose; then so
# many ranks, with sockets to each other, make every exchange of every MoE layer for these routes. `counted_mb` is what
# they handed over, `formula_mb` what `hybridlab.engine.ep_traffic` says. Hidden states and partial sums travel as
# float32, so that tokens do not depend on the number of ranks.

# %%
counted = exchange_bytes(checkpoint, tokens=256, ranks=[2, 4, 8])
hl.figures.exchange_table(counted).round(3)

# %%
ax = hl.figures.exchange_bytes(counted)

# %% [markdown]
# Up to as many ranks as experts per token (the dotted line), SmallEP sends less than a dispatch per route; beyond, its
# rows grow with the ranks, the others' do not. A dispatch per rank never sends more rows than SmallEP, but nothing of
# it can leave before the router has chosen, and first every rank must tell the others how many rows will come.
#
# ### Repeated router work
#
# `router_work` says how often each token is routed: by every rank with SmallEP, by one otherwise. What that is of a
# prompt's work is seen below, where `router_s` stands beside the whole.
#
# ## Two links against one
#
# Distributed stream-loading prefill (DSLP): each rank streams its own half of the experts, over a link of its own. The
# links are emulated and slow enough that loading takes sixteen times as long as computing, for both ranks share the
# cores of this machine.

# %%
found = dslp(checkpoint, tokens=256, ratio=16.0, repeats=3)
columns = ["system", "step_s", "load_s", "over_one_rank", "exchange_s", "router_s", "router_tokens"]
found.rows[columns].set_index("system").round(4)

# %%
ax = hl.figures.dslp(found.rows, width_in=hl.figures.TWO_COLUMNS_IN)

# %% [markdown]
# ### One rank
#
# A ring of two layers' experts: the link never rests, the GPU waits for it.

# %%
ax = hl.figures.timeline(found.spans, where={"system": "one rank"}, start_s=0.0)

# %% [markdown]
# ### Two ranks, SmallEP
#
# Each link brings half as much. Ranks meet on their NET lanes: all hidden states before a layer's router, partial sums
# after its experts. A bar there ends for both when the later one has come.

# %%
ax = hl.figures.timeline(found.spans, where={"system": "two ranks, small_ep"}, start_s=0.0)

# %% [markdown]
# ### Two ranks, dispatch per rank
#
# Hidden states leave after the router instead of before it.

# %%
ax = hl.figures.timeline(found.spans, where={"system": "two ranks, dispatch_per_rank"}, start_s=0.0)

# %% [markdown]
# ## With layers of real size
#
# What `experiments/small_ep/emulated.py` measured on a quiet machine and `results/paper/small_ep` holds.

# %%
stored = hl.figures.read_exchange("dslp")
stored[["machine", "preset", "tokens", "code", "evidence"]].drop_duplicates()

# %%
ax = hl.figures.dslp(stored, width_in=hl.figures.TWO_COLUMNS_IN)

# %% [markdown]
# Where the link is the limit, two of them take half the time, whichever way tokens are exchanged. `exchange_s` is what
# a rank spends in all exchanges, waiting for the other one included, `router_s` in routers:

# %%
stored.set_index("system")[["step_s", "load_s", "over_one_rank", "exchange_s", "router_s"]].round(4)
