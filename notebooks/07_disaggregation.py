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
# # Who waits for whom
#
# Users read their answers token by token while somebody else comes with a long prompt. If one worker computes
# everything, they wait: for the whole prompt, or, if it is cut into chunks, for one chunk with every token. With a
# worker for prompts and another one for decodes nobody waits for anybody, but each has only a part of the machine.
#
# The model is tiny and its weights are random, and all of it takes some twenty seconds: look at who waits, not at the
# milliseconds. What was measured on a quiet machine with layers of real size is shown last.

# %%
import tempfile

import hybridlab as hl
from hybridlab.bench.interference import CHUNKS, SPLIT, WHOLE, interference
from hybridlab.bench.lost_worker import lose_worker
from hybridlab.bench.one_copy import one_copy

folder = tempfile.TemporaryDirectory()
checkpoint = f"{folder.name}/tiny"
model = hl.make_checkpoint(checkpoint, "tiny", dtype="fp8", seed=0, progress=False)

# %% [markdown]
# ## Three systems, the same load
#
# Two users decode, then a prompt of 2,048 tokens arrives. The systems have the same threads; each serves the users
# alone, the prompt alone, and both together.

# %%
found = interference(
    checkpoint, prompt_tokens=2048, output_tokens=400, decodes=[0, 2], threads=2, repeats=1, progress=False
)

# %% [markdown]
# ### One worker, whole prompts
#
# The worker computes the prompt in one step. Meanwhile no user gets a token.

# %%
ax = hl.figures.worker_timeline(found.timelines, where={"system": WHOLE})

# %% [markdown]
# ### One worker, chunks
#
# Every step has a chunk of the prompt and a token of each user: tokens come more slowly, and so does the prompt.

# %%
ax = hl.figures.worker_timeline(found.timelines, where={"system": CHUNKS})

# %% [markdown]
# ### A worker for each
#
# `hl.load(..., workers={"prefill": {"threads": 1}, "decode": {"threads": 1}})` under the scheduler `paper`: short
# prompts are computed where requests decode, long ones on the prefill worker. When that is done, the prompt's KV cache
# goes to the other worker through shared memory, and its next tokens are decoded there beside the users'.

# %%
ax = hl.figures.worker_timeline(found.timelines, where={"system": SPLIT})

# %% [markdown]
# ### Interference
#
# Gaps between tokens (ITL): those of the users alone, and those while the prompt was computed. TTFT is in seconds, all
# else in ms; `p99 x` says how many times longer the longest gaps became.

# %%
columns = ["system", "TTFT alone", "TTFT mixed", "TPOT p50 alone", "TPOT p50 mixed"]
gaps = ["system", "ITL p50 alone", "ITL p50 mixed", "ITL p90 mixed", "ITL p99 alone", "ITL p99 mixed", "p99 x"]
table = hl.figures.interference_table(found.rows)
table[columns].set_index("system").round(2)

# %%
table[gaps].set_index("system").round(2)

# %%
ax = hl.figures.interference(found.rows)

# %% [markdown]
# ## A worker is killed
#
# Two users and a prompt again; now the prefill worker gets a SIGKILL in the middle of the prompt. Its memory is gone,
# and the step with it. The other worker does not notice. The engine starts another process, which maps the weights
# again, and the prompt is computed once more.

# %%
workers = {"prefill": {"threads": 1}, "decode": {"threads": 1}}
sizes = {"precision": "exact", "token_budget": 1024, "kv_tokens": 2048}
engine = hl.load(checkpoint, workers=workers, prefix_cache=False, quiet=True, **sizes)

users = [hl.Request("user 0", tuple(range(32)), 320), hl.Request("user 1", tuple(range(32, 64)), 320)]
long = hl.Request("long", tuple(range(1024)), 8, arrival_s=0.05)
lost = lose_worker(engine, [*users, long], {"name": "paper", "short_tokens": 1024}, worker="prefill")
lost.summary.set_index("worker").round(3)

# %%
ax = hl.figures.worker_timeline(lost.timeline)

# %% [markdown]
# The hatched step is the one that was lost; it ends where the new process begins it again. `equal` compares every token
# with those of an undisturbed run: none is lost, none is drawn twice.

# %%
lost.requests.set_index("request").round(3)

# %% [markdown]
# ## One copy of the weights
#
# Both workers map the same files, and the new process does so too; this one had them, when it computed for the first
# two systems. The kernel counts: `weights_mb` is what a process has mapped of them, `weights_pss_mb` its part of that,
# each page divided by the number of processes that have it. So the sum of the parts is what the weights take in memory,
# and `copies` how many of them there are. `experiments/shared_weights` does the same with packed weights.

# %%
one_copy(engine).round(2)

# %%
engine.close()

# %% [markdown]
# ## With layers of real size
#
# What `experiments/disaggregation/mixed.py` measured and `results/paper/disaggregation` holds: six layers of the size
# of Qwen3-30B-A3B's, a prompt of 2,048 tokens beside a few decodes.

# %%
stored = hl.figures.read_interference()
stored[["machine", "preset", "code", "evidence"]].drop_duplicates()

# %%
ax = hl.figures.interference(stored)

# %% [markdown]
# A worker of its own keeps nearly all gaps as short as they are without the prompt. Each of the two has one core here,
# where the single worker has both: the prompt takes longer, and decodes alone do, too.
#
# The paper claims +50% throughput at less than 15% more latency, with a GPU for each worker. In percent, of the same
# runs on two cores of one CPU:

# %%
hl.figures.claim_table(stored).set_index("num_decodes").round(1)
