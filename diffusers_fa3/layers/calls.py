"""The functions that a switched processor calls instead of PyTorch's and diffusers' attention.

`scaled_dot_product_attention` and `dispatch_attention_fn` have the names and signatures of the
functions that they replace. They ask the `Frame` of the running layer to serve the call by a
kernel. If no kernel serves it, they call the original.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3.layers import host
from diffusers_fa3.layers.frame import Frame, running

host.check()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replaces `torch.nn.functional.scaled_dot_product_attention` in a switched processor."""
    frame = running.frame
    if frame is not None:
        reason = "attention dropout" if dropout_p > 0 else ""
        if query.ndim == key.ndim == value.ndim == 4:
            q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        else:
            q, k, v = query, key, value
            reason = reason or "tensors that are not (B, H, S, D)"
        out = frame.try_kernel(
            q,
            k,
            v,
            attn_mask,
            scale=scale,
            causal=is_causal,
            axes_2d="qk",
            told=False,
            reason=reason,
        )
        if out is not None:
            return out.transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
    **later: Any,
) -> Tensor:
    """Replaces diffusers' `dispatch_attention_fn` in a switched processor; takes (B, S, H, D)."""
    frame = running.frame
    if frame is not None:
        reason = _why_not_dispatched(attention_kwargs, backend, later)
        if reason:
            frame.decline(reason)
        else:
            out = try_dispatched(
                frame,
                query,
                key,
                value,
                mask=attn_mask,
                dropout_p=dropout_p,
                causal=is_causal,
                scale=scale,
                parallel_config=parallel_config,
            )
            if out is not None:
                return out
            parallel_config = None  # a call over split tokens would have been served or refused
    out = attention_dispatch.dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        attention_kwargs,
        backend=backend,
        parallel_config=parallel_config,
        **later,
    )
    assert isinstance(out, Tensor)
    return out


def _why_not_dispatched(
    attention_kwargs: dict[str, Any] | None, backend: Any, later: dict[str, Any]
) -> str:
    """Why the call must go to another backend; empty if a kernel may serve it."""
    pinned = getattr(backend, "value", backend)
    if pinned not in (None, "fa3"):
        return f"the layer is set to backend {pinned}, until reset_attention_backend"
    if attention_kwargs or later:
        return f"options for one backend: {', '.join([*(attention_kwargs or ()), *later])}"
    return ""


def try_dispatched(
    frame: Frame,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Any,
    dropout_p: float,
    causal: bool,
    scale: float | None,
    parallel_config: Any,
) -> Tensor | None:
    """`Frame.try_kernel`, for the arguments of a diffusers backend; tensors are (B, S, H, D)."""
    reason = "attention dropout" if dropout_p > 0 else ""
    if not isinstance(mask, (Tensor, NoneType)):  # Dynamo of torch 2.9 fails on Tensor | None
        reason = f"mask of type {type(mask).__name__}"
    # diffusers' native backend reads a 2-D mask of shape (B, Sk) as a key mask. It passes any other
    # 2-D mask to SDPA, which reads it as (Sq, Sk).
    per_key = mask is not None and not reason and mask.shape == (query.shape[0], key.shape[1])
    return frame.try_kernel(
        query,
        key,
        value,
        mask,
        scale=scale,
        causal=causal,
        axes_2d="bk" if per_key else "qk",
        told=True,
        parallel_config=parallel_config,
        reason=reason,
    )
