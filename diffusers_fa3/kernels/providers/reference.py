"""Attention in plain PyTorch: serves on every device, and defines the correct result."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from diffusers_fa3.kernels.adapt import refuse, without_keys
from diffusers_fa3.kernels.contract import HALF, Kernel, Limits, Provider, Result
from diffusers_fa3.kernels.out import needs_grad
from diffusers_fa3.kernels.providers.reference_kvcache import kvcache
from diffusers_fa3.kernels.providers.sdpa import sdpa
from diffusers_fa3.options import DENSE, Lengths, Options

LIMITS = Limits(
    archs=("any",),
    dtypes=HALF | {torch.float32, torch.float64},
    max_head_dim=2**31,
    head_dim_multiple=1,
    backward=True,
    functional=True,
    reads_padding=False,
    seqused_k_backward=True,
)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    lengths: Lengths = DENSE,
    *,
    padding_is_safe: bool = False,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """See `Forward`. Half precision is accumulated in fp32; float64 stays float64.

    Reads cu_seqlens and seqused_k on the host. With softcap or return_lse, the logits of a call are
    laid out in full.
    """
    refuse("reference", options.beyond("causal", "window", "softcap"))
    if q.numel() == 0 or k.numel() == 0:
        return without_keys(q, k, v, out, return_lse)
    packed = lengths.cu_seqlens_q is not None
    if not packed and lengths.seqused_k is None and out is None:
        return sdpa(q, k, v, options, return_lse)

    parts = (_packed_parts if packed else _dense_parts)(q, k, v, lengths)
    results, lses = [], []
    for part in parts:
        result, lse = sdpa(*part, options, return_lse)
        results.append(result.flatten(0, 1) if packed else result)
        if lse is not None:
            lses.append(lse.transpose(0, 1).flatten(1, 2) if packed else lse)
    return (
        _joined(results, out, needs_grad(q, k, v)),
        torch.cat(lses, dim=1 if packed else 0) if lses else None,
    )


def _dense_parts(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Consecutive samples with equally many valid keys, as one part each, without their padding."""
    if lengths.seqused_k is None:
        yield q, k, v
        return
    used: list[int] = lengths.seqused_k.tolist()
    for first, last in _runs([(n,) for n in used]):
        keys = slice(0, used[first])
        yield q[first:last], k[first:last, keys], v[first:last, keys]


def _packed_parts(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Consecutive samples of the same lengths, as (B, S, H, D) views, without their padding."""
    assert lengths.cu_seqlens_q is not None
    assert lengths.cu_seqlens_k is not None
    ends_q: list[int] = lengths.cu_seqlens_q.tolist()
    ends_k: list[int] = lengths.cu_seqlens_k.tolist()
    q_lens = [end - start for start, end in pairwise(ends_q)]
    k_lens = [end - start for start, end in pairwise(ends_k)]
    used: list[int] = k_lens if lengths.seqused_k is None else lengths.seqused_k.tolist()
    for first, last in _runs(list(zip(q_lens, k_lens, used, strict=True))):
        samples = last - first
        part_q = q[ends_q[first] : ends_q[last]].view(samples, q_lens[first], *q.shape[1:])
        part_k, part_v = (
            x[ends_k[first] : ends_k[last]].view(samples, k_lens[first], *x.shape[1:])[
                :, : used[first]
            ]
            for x in (k, v)
        )
        yield part_q, part_k, part_v


def _runs(kinds: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of equal entries, end exclusive."""
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return pairwise([*starts, len(kinds)])


def _joined(results: list[Tensor], out: Tensor | None, recorded: bool) -> Tensor:
    if out is None:
        return results[0] if len(results) == 1 else torch.cat(results)
    if recorded:
        return out.copy_(torch.cat(results))
    row = 0
    for result in results:
        out[row : row + len(result)].copy_(result)
        row += len(result)
    return out


def load() -> Kernel:
    """The reference, which needs nothing but torch."""
    return Kernel("reference", torch.__version__, LIMITS, forward, kvcache, out="copy")


REFERENCE = Provider("reference", load, install="nothing to install", cuda=False)
