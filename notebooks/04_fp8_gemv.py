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
# # FP8 weights on a CPU
#
# A CPU has no instruction that multiplies FP8 numbers. It has one that multiplies pairs of BF16 numbers (VDPBF16PS),
# and one token needs each weight of its experts once, so the time is that of reading them, if turning FP8 into BF16 can
# hide behind the reads. This notebook shows how that is done, where the time goes, and how far from the limits of this
# machine it ends. It takes about half a minute.

# %%
import numpy as np

import hybridlab as hl
from hybridlab import kernels
from hybridlab.bench import kernels as bench_kernels

# %% [markdown]
# ## 256 codes
#
# An E4M3 byte is a sign, four bits of exponent and three of mantissa. There are 256 of them, so all can be looked at.
# Two things spoil the obvious decoder, which shifts the bits to where BF16 wants them: the subnormals next to zero have
# no leading one, and the code of NaN would become 480.

# %%
ax = hl.figures.fp8_codes()

# %% [markdown]
# ## Two tables instead of arithmetic
#
# Every value of FP8 is a value of BF16, so a table is exact. The sign is just copied, which leaves 128 entries. A BF16
# number has two bytes: two tables of 128 bytes, one for the low and one for the high byte.

# %%
table = hl.figures.fp8_table()
table.iloc[[0, 1, 7, 8, 56, 57, 126, 127]]

# %% [markdown]
# 128 bytes are two AVX-512 registers, and VPERMI2B looks up 64 bytes in two registers at once. It takes seven bits of
# an index and ignores the eighth, which is where FP8 has its sign: no masking. So 64 weights take two look-ups, one
# VPTERNLOGD that copies the sign into the high bytes, and two unpacks that put low and high bytes beside each other:
# two registers of 32 BF16 numbers, ready for two VDPBF16PS. Subnormals and NaN cost nothing: they are entries like
# all others. A Zen 5 starts two look-ups and two VDPBF16PS in a cycle, but they share an execution pipe: 64 weights
# take 2.75 cycles, 94 GB/s on one core. Its memory delivers 40, so there is time to spare; its L3 delivers more than
# 100, so there the decode is what one waits for. The same in NumPy:

# %%
codes = np.array([0x38, 0xB8, 0x01, 0x7E, 0xFF], np.uint8)
low = table["low"].to_numpy(np.uint8)[codes & 0x7F]
high = table["high"].to_numpy(np.uint8)[codes & 0x7F] | (codes & 0x80)
(np.stack([low, high], axis=-1).view(np.uint16).astype(np.uint32) << 16).view(np.float32).ravel()

# %% [markdown]
# ## The tiles
#
# In a checkpoint a row of the matrix lies in one piece. A vector then holds 64 neighbours of one row, and their sum
# runs across its lanes. Packed weights lie in tiles of 16 rows x 4 columns, 64 bytes. After unpacking each lane of 32
# bits holds two columns of one row, the activations are one broadcast, and no sum crosses lanes. Here every weight of a
# matrix is the number of its row, then of its column; these are the first 64 bytes of the packed copy.

# %%
row, column = np.mgrid[0:64, 0:128].astype(np.uint8)
scale = np.ones((1, 1), np.float32)
kernels.pack(row, scale).data[:64].reshape(4, 16)

# %%
kernels.pack(column, scale).data[:64].reshape(4, 16)

# %% [markdown]
# Four columns of rows 0 to 3, of rows 4 to 7, and so on: in the order in which the unpack instructions work on their
# 128-bit lanes. The copy is exact and of the same size; what it costs is that the file's own bytes cannot be used as
# they lie. Both layouts give the same bits.

# %%
x = np.random.default_rng(0).standard_normal((3, 128), np.float32)
packed = kernels.linear(kernels.pack(row, scale))
np.array_equal(packed(x, threads=1), kernels.linear(row, scale)(x, threads=1))

# %% [markdown]
# ## How far from the limit
#
# `hybridlab bench kernels` times the kernels against two loops: one only reads, one only multiplies. They run before
# and after each stretch of the kernel, since memory and clock of a shared machine change from second to second. Weights
# are cut from a buffer of eight times the L3 cache. This is the quick form, with noise to match: quartiles are given
# beside each number, and what is not measured says so.

# %%
bench = bench_kernels.run(quick=True, progress=False)
bench

# %% [markdown]
# Where the time goes: a fraction of the read ceiling near 1 says that the kernel waits for memory, a fraction of the
# multiply ceiling near 1 that it waits for VDPBF16PS. `python_share` is what is lost between the calls; a whole MoE
# layer is one call for that reason. The matrix of this quick run is small: one token takes tens of microseconds, of
# which starting the threads and waiting for the last one are a part. The published run further down has larger ones.

# %%
ours = bench.table.query("work == 'matrix' and matrix == 'gate_up' and weights == 'fp8' and not slow_tier")
columns = ["place", "threads", "layout", "rows", "weights_gb_s", "read_fraction", "multiply_fraction", "python_share"]
ours.query("contender == 'hybridlab' and threads == threads.max()")[columns].round(2)

# %% [markdown]
# ## The roofline
#
# FLOP per byte on the x axis: 2 for one token and FP8 weights (a multiplication and an addition for a byte), twice that
# for two tokens. Under the slope memory decides, under the flat part arithmetic. BF16 weights begin further left: the
# same work for twice the bytes.

# %%
ax = hl.figures.roofline(bench)

# %% [markdown]
# ## The crossover
#
# The same points, as bytes of weights per second over M, the tokens that share them. As long as memory decides, more
# tokens are free. From the dashed line on each of them takes time of its own. The grey line and the dashed one are
# drawn for FP8. A BF16 weight takes part in the same work and is twice the bytes, so where arithmetic decides its
# points may lie above the line, by up to a factor of two.

# %%
ax = hl.figures.weights_rate(bench)

# %% [markdown]
# ## The full picture
#
# What was published with the code: all shapes, M up to 4096, and the peers that were installed. The command is
# `hybridlab bench kernels --out results/paper/kernels`, the machine stands in the table, and `docs/peers.md` says how
# the peers are installed and called. What was asked for and what was reached stands in the README: not all of it was.

# %%
published = hl.figures.read_kernel_bench()
published["machine"].unique()

# %%
ax = hl.figures.roofline(published)

# %% [markdown]
# Against peers, name the peer. A perfect BF16 kernel reads twice the bytes, so FP8 can be twice as fast as it and no
# more; whatever is above that, the other kernel left on the table.

# %%
step = published.query("work == 'moe_step' and threads == threads.max()")
step[["model", "contender", "weights", "layout", "call_s", "read_fraction", "times_slower"]].round(4)
