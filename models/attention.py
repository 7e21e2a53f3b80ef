"""Attention of encoders that train: torch's fused kernels, in the precision whose backward pass is fast."""

import torch
from torch import Tensor
from torch.nn import functional as F


def training_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k / sqrt(d)) v: q (..., Lq, d), k and v (..., Lk, d), mask (..., 1 or Lq, Lk) of bool -> (..., Lq, d).

    On a CPU, bfloat16 is computed in float32: the backward pass of torch's fused attention takes several times as
    long there in bfloat16 (benchmarks/results/training_step.md). With or without a graph, as an image may be encoded
    once without and again with one.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # it would cast them back
            return training_attention(q.float(), k.float(), v.float(), mask, dropout).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
