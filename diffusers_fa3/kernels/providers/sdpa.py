"""Dense attention without padding by PyTorch's own SDPA: the building block of the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3.kernels.adapt import without_keys
from diffusers_fa3.kernels.contract import Result
from diffusers_fa3.options import Options


def sdpa(q: Tensor, k: Tensor, v: Tensor, options: Options, return_lse: bool = False) -> Result:
    """Dense attention: q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv), every key valid.

    Returns the output (B, Sq, H, Dv) and the log-sum-exp, fp32 (B, H, Sq), or None if not asked
    for. Takes all options but the descales.
    """
    if k.shape[1] == 0 or q.shape[1] == 0:
        return without_keys(q, k, v, None, return_lse)
    by_flag = options.causal and q.shape[1] == k.shape[1] and options.window == (-1, -1)
    if options.softcap or return_lse or not by_flag:
        seen = _seen(q.shape[1], k.shape[1], options.causal, options.window, q.device)
    else:
        seen = None
    # What PyTorch's attention gives for a query that sees no key depends on its backend.
    last = 0 if options.causal else options.window[1]
    some_see_none = last >= 0 and k.shape[1] - q.shape[1] + last < 0
    if options.softcap or return_lse or some_see_none:
        return _by_logits(q, k, v, options, seen, return_lse)
    result = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen,
        is_causal=by_flag,
        scale=options.softmax_scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return result.transpose(1, 2), None


def _by_logits(
    q: Tensor, k: Tensor, v: Tensor, options: Options, seen: Tensor | None, return_lse: bool
) -> Result:
    group = q.shape[2] // k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide_q, wide_k, wide_v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (wide_k, wide_v))

    logits = (wide_q * options.softmax_scale) @ wide_k.transpose(-1, -2)
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    empty = None
    if seen is not None:
        # A row without keys keeps its finite logits here, and its weights are set to 0 below. So
        # neither the forward nor the backward has NaN.
        empty = ~seen.any(-1, keepdim=True)
        logits = logits.masked_fill(~(seen | empty), -torch.inf)
    weights = logits.softmax(-1)
    lse = logits.logsumexp(-1) if return_lse else None
    if empty is not None:
        weights = weights.masked_fill(empty, 0.0)
        lse = None if lse is None else lse.masked_fill(empty.squeeze(-1), -torch.inf)
    result = (weights @ wide_v).to(q.dtype).transpose(1, 2)
    return result, None if lse is None else lse.float()


def _seen(
    q_len: int, k_len: int, causal: bool, window: tuple[int, int], device: torch.device
) -> Tensor | None:
    """The keys that each query sees, (Sq, Sk) bool, aligned bottom-right; None for all keys."""
    left, right = window
    right = 0 if causal else right
    if left < 0 and right < 0:
        return None
    queries = torch.arange(k_len - q_len, k_len, device=device)[:, None]
    offset = torch.arange(k_len, device=device) - queries
    if right < 0:
        return offset >= -left
    return offset <= right if left < 0 else (offset >= -left) & (offset <= right)
