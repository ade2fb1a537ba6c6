"""What adapters share: calls that must not reach a kernel, and calls that are rewritten for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels.contract import Forward, InnerForward, Result
from diffusers_fa3.kernels.out import needs_grad, out_dtype
from diffusers_fa3.options import DENSE, Lengths, Options


def shielded(forward: InnerForward) -> Forward:
    """Wrap `forward`: it gets no call without queries or keys, and no NaN or inf from padding in v.

    For a call without keys, FlashAttention-3 returns a log-sum-exp of +inf; other kernels fail.
    """

    def call(
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
        if not (q.numel() and k.numel()):
            return without_keys(q, k, v, out, return_lse)
        if lengths.seqused_k is not None and not padding_is_safe:
            v = without_padding(v, lengths.seqused_k, lengths.cu_seqlens_k)
        return forward(q, k, v, options, lengths, out=out, return_lse=return_lse)

    return call


def without_keys(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, return_lse: bool) -> Result:
    """Attention without keys or queries: 0 as in SDPA, log-sum-exp -inf; autograd still records."""
    rows = q.shape[:-1]
    result = q.new_zeros((*rows, v.shape[-1]), dtype=out_dtype(q))
    if needs_grad(q, k, v):
        result = result + sum(x[..., :0].sum() for x in (q, k, v))
    lse = None
    if return_lse:
        shape = (rows[1], rows[0]) if len(rows) == 2 else (rows[0], rows[2], rows[1])
        lse = q.new_full(shape, -torch.inf, dtype=torch.float32)
    return result if out is None else out.copy_(result), lse


def dense_as_packed(forward: InnerForward) -> InnerForward:
    """Wrap `forward`, which takes only packed calls, to take dense calls too.

    The samples of a dense call are flattened to (B * S, H, D): a view where they follow each other
    in memory, else a copy.
    """

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        lengths: Lengths = DENSE,
        *,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Result:
        if lengths.cu_seqlens_q is not None:
            return forward(q, k, v, options, lengths, out=out, return_lse=return_lse)
        batch, q_len, k_len = q.shape[0], q.shape[1], k.shape[1]
        ends_q = _ends(batch, q_len, q.device)
        ends_k = ends_q if k_len == q_len else _ends(batch, k_len, q.device)
        # If out's samples do not follow each other in memory, out has no packed view to write into.
        in_order = out is not None and (batch == 1 or out.stride(0) == q_len * out.stride(1))
        result, lse = forward(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            options,
            Lengths(ends_q, ends_k, q_len, k_len, lengths.seqused_k),
            out=out.flatten(0, 1) if out is not None and in_order else None,
            return_lse=return_lse,
        )
        if lse is not None:
            lse = lse.view(-1, batch, q_len).transpose(0, 1)
        if out is not None:
            return (out if in_order else out.copy_(result.view_as(out))), lse
        return result.view(batch, q_len, *result.shape[1:]), lse

    return call


def _ends(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, max(length, 1), dtype=torch.int32, device=device)


def without_padding(v: Tensor, seqused_k: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    """`v` with 0 in the rows of padding, beyond each sample's `seqused_k`.

    FlashAttention-3 reads keys in tiles. Padding in a sample's last tile gets a weight of 0, but 0
    times NaN or inf in v is NaN in the output. NaN and inf in k do no harm. Seen on an H100.
    """
    padding = _padding(v.shape[-3], seqused_k, cu_seqlens_k)
    plain = v.view(torch.uint8) if v.dtype.itemsize == 1 else v  # float8 has no `where`
    # masked_fill copies first and then fills: 130 us against 83 for 57 MB on an H100.
    return torch.where(padding[..., None, None], 0, plain).view(v.dtype)


def _padding(length: int, seqused_k: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    row = torch.arange(length, dtype=torch.int32, device=seqused_k.device)
    if cu_seqlens_k is None:
        return row >= seqused_k[:, None]
    sample = torch.bucketize(row, cu_seqlens_k[1:], right=True).clamp_(max=len(seqused_k) - 1)
    return row >= (cu_seqlens_k[:-1] + seqused_k)[sample]


def dense_last_axis(x: Tensor) -> Tensor:
    """`x` with a last axis of stride 1, as kernels need it; a copy only if the stride differs."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_rows_minus_inf(lse: Tensor) -> Tensor:
    """`lse` with -inf for +inf, which FlashAttention-2 gives only in rows without keys."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def refuse(kernel: str, asked: Iterable[str]) -> None:
    """Raise KernelUnavailableError if `asked` names any option; `kernel` has none of them."""
    names = ", ".join(asked)
    if names:
        raise KernelUnavailableError(
            f'{kernel} cannot take {names}; call without, or say kernel="auto"'
        )
