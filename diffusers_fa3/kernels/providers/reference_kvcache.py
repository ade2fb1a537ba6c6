"""Attention over a key-value cache in plain PyTorch; new keys are written into the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_fa3.errors import InputError
from diffusers_fa3.kernels.adapt import refuse
from diffusers_fa3.kernels.contract import Result
from diffusers_fa3.kernels.providers.sdpa import sdpa
from diffusers_fa3.options import Options, is_default


def kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    softmax_scale: float,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    out: Tensor | None = None,
    return_lse: bool = False,
    **unknown: Any,
) -> Result:
    """`flash_attn_with_kvcache` for dense queries. Lengths are read on the host.

    Args:
        q: (B, Sq, H, D).
        k_cache: (B or more, Sk, Hk, D), or (pages, page size, Hk, D) with a page_table.
        v_cache: k_cache's shape, with Dv.
        softmax_scale: factor of the logits.
        k: (B, Sn, Hk, D), new keys, written in place behind the valid keys of each sample.
        v: (B, Sn, Hk, Dv), the values of the new keys.
        cache_seqlens: (B,), valid keys of each sample before the new keys; None: a full cache.
        cache_batch_idx: (B,), the row of the cache that belongs to each sample.
        page_table: (B, pages of a sample), the pages of each sample in order.
        causal: bottom-right aligned, over the valid and the new keys.
        window_size: keys seen to the left and right; -1 is no limit.
        softcap: bound of the logits; 0 is no bound.
        out: (B, Sq, H, Dv), filled and returned.
        return_lse: also return the log-sum-exp, (B, H, Sq).
        unknown: options that this kernel refuses, unless they ask for nothing.

    Raises:
        InputError: page_table and cache_batch_idx together, or no room for the new keys.
        KernelUnavailableError: an option that this kernel does not know.
    """
    refuse("reference", (name for name, value in unknown.items() if not is_default(value)))
    options = Options(softmax_scale, causal, window_size, softcap)
    batch, page_size = len(q), k_cache.shape[1]
    if page_table is None:
        rows = torch.arange(batch, device="cpu")
        rows = rows if cache_batch_idx is None else cache_batch_idx.cpu()
        page_table = rows[:, None]
    elif cache_batch_idx is not None:
        raise InputError(
            "page_table and cache_batch_idx exclude each other; got both. Leave one out"
        )
    capacity = page_table.shape[1] * page_size
    lens = [capacity] * batch if cache_seqlens is None else cache_seqlens.tolist()
    new = 0 if k is None else k.shape[1]
    if max(lens, default=0) + new > capacity:
        raise InputError(
            f"the cache holds {capacity} keys; {max(lens)} and {new} new do not fit. Make it "
            "longer, or give more pages"
        )

    if out is None:
        out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    lses = []
    for sample, length in enumerate(lens):
        places = torch.arange(length + new, device="cpu")
        pages = page_table[sample].to(k_cache.device)[places // page_size]
        at = (pages, (places % page_size).to(k_cache.device))
        if k is not None and v is not None:
            tail = tuple(index[length:] for index in at)
            k_cache[tail], v_cache[tail] = k[sample], v[sample]
        part, lse = sdpa(
            q[sample : sample + 1],
            k_cache[at][None],
            v_cache[at][None],
            options,
            return_lse,
        )
        out[sample] = part[0]
        lses.append(lse)
    return out, torch.cat([lse for lse in lses if lse is not None]) if return_lse else None
