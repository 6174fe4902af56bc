"""Attention of decoding tokens over the paged KV cache: Triton on a GPU, torch elsewhere.

Legend: T tokens, N query heads, G key/value heads, D head_dim, S slots of the cache, B blocks of a table.
"""

from __future__ import annotations

import torch

from hybridlab.model.base import DecodeBatch
from hybridlab.model.cuda_blocks import triton_module


def decode_attention(
    q_TND: torch.Tensor, keys_SGD: torch.Tensor, values_SGD: torch.Tensor, batch: DecodeBatch, *, twin: bool = False
) -> torch.Tensor:
    """Each token attends to the first `batch.lengths` tokens of its request; BF16 [T, N, D].

    q BF16, keys and values BF16 [S, G, D]. Nothing is read back: lengths and tables may change between two replays of a
    captured step. `twin` takes the torch version on a GPU too.
    """
    if q_TND.is_cuda and not twin and (kernels := triton_module("triton_attention")) is not None:
        return kernels.decode_attention(q_TND, keys_SGD, values_SGD, batch.tables, batch.lengths, batch.block_tokens)
    out = torch.empty_like(q_TND)
    groups = keys_SGD.shape[1]
    for token, (table, length) in enumerate(zip(batch.tables, batch.lengths.tolist(), strict=True)):
        slots = table.long()[:, None] * batch.block_tokens + torch.arange(batch.block_tokens, device=table.device)
        slots = slots.flatten()[:length]
        q_GRD = q_TND[token].view(groups, -1, q_TND.shape[2]).float()
        scores = q_GRD @ keys_SGD[slots].permute(1, 2, 0).float() * q_TND.shape[2] ** -0.5
        result = scores.softmax(-1).to(values_SGD.dtype).float() @ values_SGD[slots].transpose(0, 1).float()
        out[token] = result.view(q_TND.shape[1:])
    return out
