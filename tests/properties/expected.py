"""What a call must give: by PyTorch's attention, and by the plain formula in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from zoo.budget import FACTOR, error

from .masks import Mask

FLOORS = {
    torch.float64: 64.0,
    torch.float32: 64.0,
    torch.float16: 2.0,
    torch.bfloat16: 2.0,
}
"""Units in the last place of the largest value, allowed besides: the default's own error may be 0
where there are few numbers."""


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> Tensor:
    """PyTorch's attention, on (B, S, H, D)."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def logits(q: Tensor, k: Tensor, mask: Mask | None, scale: float | None, causal: bool) -> Tensor:
    """(B, H, Sq, Sk) in float64, -inf where a key is not seen."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    all_of_them = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    if causal:
        return all_of_them.masked_fill(
            torch.ones_like(all_of_them, dtype=torch.bool).triu(1), -torch.inf
        )
    return all_of_them if mask is None else all_of_them.masked_fill(~mask.seen, -torch.inf)


def formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None, causal: bool
) -> Tensor:
    """softmax(logits) v in float64, 0 in rows without a key; its gradients are finite."""
    each = logits(q, k, mask, scale, causal)
    empty = (each == -torch.inf).all(-1, keepdim=True)
    weights = each.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2).double()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def assert_close_as(default: Tensor, output: Tensor, exact: Tensor, largest: float) -> None:
    """Assert that `output` is about as close to `exact` as `default` is, which is of its dtype.

    Args:
        default: what PyTorch's attention gives.
        output: what ours does.
        exact: in float64.
        largest: of the values that were averaged.
    """
    assert output.shape == default.shape
    assert output.dtype == default.dtype
    if not output.numel():
        return
    assert torch.isfinite(output).all(), "output is not finite"
    floor = FLOORS[output.dtype] * torch.finfo(output.dtype).eps * largest
    allowed = FACTOR * error(default, exact) + floor
    found = error(output, exact)
    assert found <= allowed, f"error {found:.3g} against float64; {allowed:.3g} is allowed"


def largest(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0
