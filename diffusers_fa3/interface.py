"""FlashAttention-3's function for packed samples, on any kernel, with the contract for `out`."""

from __future__ import annotations

from torch import Tensor

from diffusers_fa3.errors import InputError
from diffusers_fa3.interface_checks import (
    check_lengths,
    check_tensors,
    read_window,
    refuse_arguments,
)
from diffusers_fa3.kernels import (
    KernelChoice,
    Request,
    check_out,
    needs_grad,
    read_machine,
    select,
)
from diffusers_fa3.options import Lengths, Options


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    kernel: KernelChoice = "auto",
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within samples that lie end to end, with FlashAttention-3's arguments in its order.

    A sample without keys gives 0, with a log-sum-exp of -inf.

    Args:
        q: (Tq, H, D); FlashAttention-3's head sizes and dtypes, or the reference's.
        k: (Tk, Hk, D), of q's dtype and device; H is a multiple of Hk.
        v: (Tk, Hk, Dv), likewise.
        cu_seqlens_q: int32 (B + 1), where each sample's queries begin and end; the last is Tq.
        cu_seqlens_k: int32 (B + 1), likewise for keys.
        max_seqlen_q: the longest sample's queries, or more.
        max_seqlen_k: likewise for keys.
        seqused_q: refused.
        seqused_k: int32 (B,), how many of a sample's keys are valid, from its first.
        softmax_scale: factor of the logits; None is D ** -0.5.
        causal: the last query of a sample sees all its keys, the one before all but one, ...
        qv: refused.
        q_descale: fp32 (B, Hk), for float8.
        k_descale: likewise.
        v_descale: likewise.
        window_size: keys seen to the left and right of a query's own, -1 for all.
        attention_chunk: refused, unless 0.
        softcap: bound of the logits by tanh, 0 for none.
        num_splits: refused, unless 1.
        pack_gqa: refused, unless None: a kernel chooses by itself.
        deterministic: refused where gradients are needed; the forward always is.
        sm_margin: refused, unless 0.
        return_attn_probs: FlashAttention's name of `return_lse`.
        kernel: "auto", a name from `available_kernels()`, or a function with these arguments.
        out: (Tq, H, Dv), of q's dtype; receives the result and is returned. Not with autograd.
        return_lse: also return the log-sum-exp, fp32 (H, Tq), natural log.

    Returns:
        (Tq, H, Dv), or that and the log-sum-exp.

    Raises:
        InputError: arguments that do not belong together, or that no kernel here takes.
        KernelUnavailableError: no kernel can serve, or not the one asked for.

    Example:
        >>> import torch
        >>> from diffusers_fa3 import flash_attn_varlen_func
        >>> q, k, v = torch.randn(3, 7, 4, 8)  # two samples, of 2 and 5 tokens: (T, H, D)
        >>> cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5).shape
        torch.Size([7, 4, 8])
    """
    check_tensors(q, k, v, rank=3)
    check_lengths("cu_seqlens_q", cu_seqlens_q, q, None)
    samples = len(cu_seqlens_q) - 1
    check_lengths("cu_seqlens_k", cu_seqlens_k, q, samples + 1)
    if seqused_k is not None:
        check_lengths("seqused_k", seqused_k, q, samples)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(value, int) or value < 0:
            raise InputError(
                f"{name} must be an int on the host, not negative; got {value!r}. Give a bound, "
                f"e.g. {name}=int(cu_seqlens.diff().max())"
            )
    backward = needs_grad(q, k, v)
    refuse_arguments(
        seqused_q=seqused_q,
        qv=qv,
        attention_chunk=attention_chunk,
        num_splits=num_splits - 1,
        pack_gqa=pack_gqa,
        deterministic=deterministic and backward,
        sm_margin=sm_margin,
    )
    if out is not None:
        check_out(out, q, v, others=(k,))
    return_lse = return_lse or return_attn_probs
    window = read_window(window_size)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = Options(scale, causal, window, softcap, q_descale, k_descale, v_descale)
    request = request_of(q, v, options, return_lse)
    request = request._replace(seqused_k=seqused_k is not None, backward=backward)
    result, lse = select(request, read_machine(q.device), kernel).forward(
        q,
        k,
        v,
        options,
        Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k),
        out=out,
        return_lse=return_lse,
    )
    return result if lse is None else (result, lse)


def request_of(q: Tensor, v: Tensor, options: Options, return_lse: bool) -> Request:
    """What a call of one of these functions asks of a kernel, as far as both can ask it."""
    return Request(
        dtype=q.dtype,
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        window=options.window != (-1, -1),
        softcap=options.softcap != 0,
        lse=return_lse,
    )
