"""Attention in float64, one sample and one head at a time: slow, and too simple to be wrong."""

from __future__ import annotations

import torch
from torch import Tensor


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(Sq, H, D), (Sk, Hk, D), (Sk, Hk, Dv) of one sample -> (Sq, H, Dv), (H, Sq), in float64."""
    (q_len, heads, _), (k_len, kv_heads, _) = q.shape, k.shape
    out = torch.zeros(q_len, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((heads, q_len), -torch.inf, dtype=torch.float64)
    left, right = window
    for h in range(heads):
        kv = h // (heads // kv_heads)
        for i in range(q_len):
            at = i + k_len - q_len
            last = min(at if causal else k_len, at + right if right >= 0 else k_len, k_len - 1)
            first = max(at - left, 0) if left >= 0 else 0
            if last < first:
                continue
            seen = slice(first, last + 1)
            logits = k[seen, kv].double() @ q[i, h].double() * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            out[i, h] = logits.softmax(0) @ v[seen, kv].double()
            lse[h, i] = logits.logsumexp(0)
    return out, lse


def close(got: Tensor, want: Tensor, rounding: Tensor | None = None, logits: float = 1.0) -> None:
    """Assert equality up to the rounding of got's dtype, for values of about 1.

    Args:
        rounding: a tensor whose dtype sets the rounding instead.
        logits: the largest logit. Its absolute error, eps times itself, is the relative error of
            its key's weight.
    """
    eps = torch.finfo(got.dtype).eps if rounding is None else torch.finfo(rounding.dtype).eps
    allowed = 8 * eps * max(logits, 1.0)
    torch.testing.assert_close(got.double(), want.double(), atol=allowed, rtol=allowed)
