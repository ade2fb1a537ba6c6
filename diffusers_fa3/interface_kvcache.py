"""FlashAttention-3's function for a key-value cache, on any kernel, with the contract for `out`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_fa3.errors import InputError, KernelUnavailableError
from diffusers_fa3.interface import request_of
from diffusers_fa3.interface_checks import (
    check_lengths,
    check_new_keys,
    check_tensors,
    read_window,
)
from diffusers_fa3.kernels import (
    Kernel,
    KernelChoice,
    check_out,
    needs_grad,
    read_machine,
    select,
)
from diffusers_fa3.options import Options, is_default


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    kernel: KernelChoice = "auto",
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a key-value cache, into which new keys are first written, in place.

    FlashAttention-3's arguments in its order. A kernel refuses what it has no argument for; the
    reference takes k, v, cache_seqlens, cache_batch_idx, page_table, causal, window_size, softcap.

    Args:
        q: (B, Sq, H, D), or (Tq, H, D) with cu_seqlens_q.
        k_cache: (B or more, Sk, Hk, D), or (pages, page size, Hk, D) with page_table.
        v_cache: likewise, with Dv.
        k: (B, Sn, Hk, D), new keys: written behind each sample's valid ones, then attended too.
            FlashAttention-3 does not write those of a sample without queries.
        v: (B, Sn, Hk, Dv), likewise.
        qv: (B, Sq, H, Dv), where the kernel has it.
        rotary_cos: (length, D // 2), where the kernel has it, and rotary_sin.
        rotary_sin: likewise.
        cache_seqlens: int32 (B,), or one int: valid keys before the new ones; None: all.
        cache_batch_idx: int32 (B,), each sample's row of the cache.
        cache_leftpad: int32 (B,), where each sample's keys begin.
        page_table: int32 (B, pages of a sample).
        cu_seqlens_q: int32 (B + 1), for packed queries.
        cu_seqlens_k_new: int32 (B + 1), for packed new keys.
        max_seqlen_q: with cu_seqlens_q.
        rotary_seqlens: int32 (B,).
        q_descale: fp32 (B, Hk), for float8.
        k_descale: likewise.
        v_descale: likewise.
        softmax_scale: factor of the logits; None is D ** -0.5.
        causal: bottom-right aligned over the valid keys with the new ones.
        window_size: keys seen to the left and right of a query's own, -1 for all.
        attention_chunk: where the kernel has it.
        softcap: bound of the logits by tanh, 0 for none.
        rotary_interleaved: with rotary_cos: pairs are (0, 1), (2, 3), ...; False: the first half
            goes with the second one, for head sizes that are multiples of 64.
        scheduler_metadata: where the kernel has it.
        num_splits: into how many parts a sample's keys are split; 0 lets the kernel choose.
        pack_gqa: None lets the kernel choose.
        sm_margin: multiprocessors left free.
        return_softmax_lse: FlashAttention's name of `return_lse`.
        kernel: "auto" or a name from `available_kernels()`.
        out: q's shape with Dv, of q's dtype; receives the result and is returned.
        return_lse: also return the log-sum-exp, fp32 (B, H, Sq), or (H, Tq) for packed queries.

    Returns:
        The output, or that and the log-sum-exp. (FlashAttention adds its scratch to these.)

    Raises:
        InputError: arguments that do not belong together; autograd, which no cache kernel records;
            rotary halves of another head size than a multiple of 64.
        KernelUnavailableError: no kernel can serve, or not the one asked for.

    Example:
        >>> import torch
        >>> from diffusers_fa3 import flash_attn_with_kvcache
        >>> k_cache, v_cache = torch.zeros(2, 1, 16, 4, 8)  # (B, Sk, H, D), 3 keys of it valid
        >>> q, k, v = torch.randn(3, 1, 1, 4, 8)  # a token
        >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3).shape
        torch.Size([1, 1, 4, 8])
        >>> torch.equal(k_cache[:, 3], k[:, 0])
        True
    """
    check_tensors(q, k_cache, v_cache, rank=4 if cu_seqlens_q is None else 3, rank_k=4)
    check_new_keys(k, v, k_cache, v_cache)
    written = [x for x in (k, v) if x is not None]
    if needs_grad(q, k_cache, v_cache, *written):
        raise InputError("attention over a cache records no gradient; call under torch.no_grad()")
    if out is not None:
        check_out(out, q, v_cache, others=(k_cache, *written))
    if rotary_cos is not None and not rotary_interleaved and q.shape[-1] % 64:
        raise InputError(
            "rotary_cos of halves needs a head size that is a multiple of 64, since a build of "
            f"FlashAttention-3 gave wrong results at 72; got {q.shape[-1]}. Rotate q and k before "
            "the call"
        )
    samples = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    if cache_batch_idx is not None:
        check_lengths("cache_batch_idx", cache_batch_idx, q, samples)
    elif page_table is None and len(k_cache) != samples:
        raise InputError(
            f"the cache must have a row for each sample; got {len(k_cache)} for {samples}. Name "
            "the rows by cache_batch_idx, or give a page_table"
        )
    if k is not None and cu_seqlens_k_new is None and len(k) != samples:
        raise InputError(
            f"k and v must have new keys for each sample; got {len(k)} for {samples}. Give one row "
            "for each"
        )
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((samples,), cache_seqlens, dtype=torch.int32, device=q.device)
    elif cache_seqlens is not None:
        check_lengths("cache_seqlens", cache_seqlens, q, samples)
    if k is not None and cache_seqlens is None:
        raise InputError(
            "k and v need cache_seqlens: behind how many valid keys they belong; got none. Give an "
            "int, or int32 (B,)"
        )

    return_lse = return_lse or return_softmax_lse
    window = read_window(window_size)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    request = request_of(q, v_cache, Options(scale, causal, window, softcap), return_lse)
    request = request._replace(
        varlen=cu_seqlens_q is not None, kvcache=True, page_table=page_table is not None
    )
    chosen = select(request, read_machine(q.device), kernel)
    asked: dict[str, Any] = {
        "k": k,
        "v": v,
        "qv": qv,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "page_table": page_table,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k_new": cu_seqlens_k_new,
        "max_seqlen_q": max_seqlen_q,
        "rotary_seqlens": rotary_seqlens,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "causal": causal,
        "window_size": window,
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "scheduler_metadata": scheduler_metadata,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "sm_margin": sm_margin,
    }
    asked = {name: value for name, value in asked.items() if not is_default(value)}
    if rotary_cos is not None:
        asked["rotary_interleaved"] = rotary_interleaved
    result, lse = _cache_entry(chosen)(
        q,
        k_cache,
        v_cache,
        **asked,
        softmax_scale=scale,
        out=out,
        return_lse=return_lse,
    )
    return result if lse is None else (result, lse)


def _cache_entry(kernel: Kernel) -> Any:
    if kernel.kvcache is None:
        raise KernelUnavailableError(
            f'{kernel.name} has no entry for a key-value cache; say kernel="auto"'
        )
    return kernel.kvcache
