"""`attention`: one call without a model, for any mask."""

from __future__ import annotations

import warnings

from torch import Tensor

from diffusers_fa3.attention import Declined, attend, default_attention
from diffusers_fa3.errors import FallbackWarning
from diffusers_fa3.fastest import FASTEST, attend_fastest
from diffusers_fa3.kernels import AUTOMATIC, KernelChoice
from diffusers_fa3.masks import PackingPlan


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | PackingPlan | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    kernel: KernelChoice = "auto",
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over the keys that `mask` leaves valid, on a variable-length kernel.

    Equal to `scaled_dot_product_attention` with the same mask. A row without any valid key is 0.
    Values at padded keys never matter, not even NaN or inf.

    Args:
        q: (B, Sq, H, D). Under `torch.autocast`, q, k and v are cast as PyTorch's attention does.
        k: (B, Sk, Hk, D), of q's dtype and device; H is a multiple of Hk.
        v: (B, Sk, Hk, Dv), likewise.
        mask: None; or bool (True: the key is seen), int (0 or 1) or additive float (0 or <= -1e4),
            of shape (Sk), (B, Sk), (B, 1, 1, Sk), (B, H, 1, Sk), (B, 1, Sq, Sk) or (B, H, Sq, Sk);
            or a plan that `plan_packing` made of such a mask, which is then not read again.
        scale: factor of the logits; None is D ** -0.5.
        causal: query i sees keys up to i. Needs Sq = Sk and no mask.
        kernel: "auto", "fastest", a name from `available_kernels()`, or a function with
            FlashAttention's arguments. A name or function is used, or the call is refused. "auto"
            takes the best installed kernel. Where no kernel can serve, or packing cannot express
            the mask, "auto" takes PyTorch's attention, with a `FallbackWarning` that says why.
            "fastest" times the kernels that "auto" may take and PyTorch's attention on the first
            call of a kind, and takes the fastest from then on.
        out: (B, Sq, H, Dv), of q's dtype; receives the result and is returned. Not with autograd.
        return_lse: also return the log-sum-exp of the logits, fp32 (B, H, Sq), natural log; -inf in
            rows without a valid key. PyTorch's attention has no log-sum-exp, so such a call is
            served by a kernel or refused.

    Raises:
        InputError: shapes, dtypes or devices that do not belong together; an unfit `out`.
        MaskError: the mask does not broadcast or lies on another device; or, with `kernel` given
            or `return_lse`, packing cannot express it.
        KernelUnavailableError: the asked-for kernel cannot serve, with every reason.

    Example:
        >>> import torch
        >>> from diffusers_fa3 import attention
        >>> q, k, v = torch.randn(3, 2, 6, 4, 8)  # (B, S, H, D)
        >>> padding = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1]])  # (B, Sk)
        >>> attention(q, k, v, padding).shape
        torch.Size([2, 6, 4, 8])
    """
    serve = attend_fastest if kernel == FASTEST else attend
    answer = serve(
        q, k, v, mask, scale=scale, causal=causal, kernel=kernel, out=out, return_lse=return_lse
    )
    if isinstance(answer, Declined):
        if kernel not in AUTOMATIC or return_lse or isinstance(mask, PackingPlan):
            raise answer.error
        if not answer.lead:
            words = f"PyTorch's attention serves: {answer.reason}"
            warnings.warn(words, FallbackWarning, stacklevel=2)
        result = default_attention(q, k, v, mask, scale, causal)
        return result if out is None else out.copy_(result)
    return answer.out if answer.lse is None else (answer.out, answer.lse)
