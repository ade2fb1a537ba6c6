"""START HERE. One attention call, from q, k, v and a mask to the output, on one screen.

Axis letters, here and everywhere: B batch, H query heads, Hk key and value heads, Sq and Sk
lengths, D head size (Dv of v), T packed tokens. Layout (B, S, H, D).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3.errors import (
    FA3Error,
    FallbackWarning,
    InputError,
    KernelUnavailableError,
    MaskError,
)
from diffusers_fa3.inputs import check_inputs
from diffusers_fa3.kernels import (
    GraphKernel,
    Kernel,
    KernelChoice,
    Request,
    check_out,
    graph_kernel,
    read_machine,
    select,
    without_keys,
)
from diffusers_fa3.masks import Axes2D, Opaque, PackingPlan, Plan, try_plan
from diffusers_fa3.options import Options

_UNMASKED = PackingPlan("dense", 0, 0, 0)
"""Of no sizes: tensors go to the kernel as they are, whatever they are."""

FindPlan = Callable[[Tensor, object, Callable[[], Plan]], Plan]
"""Finds the plan for a mask and the rest of the call again, or has it made."""


class Served(NamedTuple):
    """What a kernel made of a call. A tuple, which is made fast."""

    out: Tensor
    lse: Tensor | None
    kernel: str
    route: str


@dataclass(frozen=True, slots=True)
class Declined:
    """Why no kernel took a call, in words, and the error that this is where it has to be one."""

    reason: str
    error: FA3Error


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | PackingPlan | None,
    *,
    scale: float | None,
    causal: bool,
    kernel: KernelChoice,
    axes_2d: Axes2D = "bk",
    pack_queries: bool = False,
    find_plan: FindPlan | None = None,
    switch_id: int = 0,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Served | Declined:
    """The way of the data: `attention` and every processor go it."""
    check_inputs(q, k, v, mask, causal)
    batch, q_len, heads, head_dim = q.shape
    k_len = k.shape[1]
    if q.numel() == 0 or k_len == 0:
        return Served(*without_keys(q, k, v, out, return_lse), "none", "empty")

    # Who can serve this call?
    request = Request(
        dtype=q.dtype,
        head_dim=head_dim,
        head_dim_v=v.shape[-1],
        varlen=mask is not None,
        seqused_k=isinstance(mask, PackingPlan) and mask.lengths.seqused_k is not None,
        lse=return_lse,
        backward=torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    chosen = _choose(request, q.device, kernel, switch_id)
    if isinstance(chosen, Declined):
        return chosen

    # What does the mask mean, and which plan follows?
    sizes = (batch, heads, q_len, k_len)
    plan = _plan(mask, sizes, axes_2d, chosen.seqused_k, pack_queries, find_plan)
    if isinstance(plan, Opaque):
        return _declined(plan.reason, MaskError)

    if plan.route == "packed" and not (plan.lengths.max_seqlen_q and plan.lengths.max_seqlen_k):
        return Served(*without_keys(q, k, v, out, return_lse), "none", "empty")
    if plan.window != (-1, -1):
        # Only now is it known that a sliding window is needed, which not every build has.
        chosen = _choose(request._replace(window=True), q.device, kernel, switch_id)
        if isinstance(chosen, Declined):
            return chosen

    # The kernel, between pack and unpack; a second time where queries see in two ways.
    scale = head_dim**-0.5 if scale is None else scale
    result, lse = _launch(chosen, plan, q, k, v, scale, causal, out, return_lse)
    if plan.also is not None:
        rest, rest_lse = _launch(chosen, plan.also, q, k, v, scale, causal, None, return_lse)
        result = result + rest if out is None else out.add_(rest)
        lse = None if lse is None or rest_lse is None else torch.maximum(lse, rest_lse)
    return Served(result, lse, chosen.name, plan.route)


def _launch(
    chosen: Kernel | GraphKernel,
    plan: PackingPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    out: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    options = Options(softmax_scale, causal or plan.causal, plan.window)
    if plan.route == "dense":
        return chosen.forward(q, k, v, options, out=out, return_lse=return_lse)
    result, lse = chosen.forward(
        *plan.pack(q, k, v, chosen.reads_padding),
        options,
        plan.lengths,
        padding_is_safe=True,
        out=plan.buffer(out),
        return_lse=return_lse,
    )
    return plan.unpack(result, out), None if lse is None else plan.unpack_lse(lse)


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
    A kernel never reads what lies at padded keys, be it NaN or inf.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D), of q's dtype and device; H is a multiple of Hk.
        v: (B, Sk, Hk, Dv), likewise.
        mask: None; or bool (True: the key is seen), int (0 or 1) or additive float (0 or <= -1e4),
            of shape (Sk), (B, Sk), (B, 1, 1, Sk), (B, H, 1, Sk), (B, 1, Sq, Sk) or (B, H, Sq, Sk);
            or a plan that `plan_packing` made of such a mask, and which is then not read again.
        scale: factor of the logits; None is D ** -0.5.
        causal: query i sees keys up to i. Needs Sq = Sk and no mask.
        kernel: "auto", a name from `available_kernels()`, or a function with FlashAttention's
            arguments. A name or function is honoured or refused. "auto" takes the best kernel that
            is installed, and where none can serve, or packing cannot express the mask, PyTorch's
            own attention, with a `FallbackWarning` that says why.
        out: (B, Sq, H, Dv), of q's dtype; receives the result and is returned. Not with autograd.
        return_lse: also return the log-sum-exp of the logits, fp32 (B, H, Sq), natural log; -inf in
            rows without a valid key. Never falls back: PyTorch's attention has none.

    Raises:
        InputError: shapes, dtypes or devices that do not belong together; an unfit `out`.
        MaskError: the mask does not broadcast or lies on another device; or, with `kernel` given
            or `return_lse`, packing cannot express it.
        KernelUnavailableError: the asked-for kernel cannot serve, with every reason.
    """
    if out is not None:
        check_out(out, q, v, others=(k, mask) if isinstance(mask, Tensor) else (k,))
    answer = attend(
        q, k, v, mask, scale=scale, causal=causal, kernel=kernel, out=out, return_lse=return_lse
    )
    if isinstance(answer, Declined):
        if kernel != "auto" or return_lse or isinstance(mask, PackingPlan):
            raise answer.error
        warnings.warn(f"PyTorch's attention serves: {answer.reason}", FallbackWarning, stacklevel=2)
        result = _default(q, k, v, mask, scale, causal)
        return result if out is None else out.copy_(result)
    return answer.out if answer.lse is None else (answer.out, answer.lse)


def _choose(
    request: Request, device: torch.device, kernel: KernelChoice, switch_id: int
) -> Kernel | GraphKernel | Declined:
    if torch.compiler.is_compiling() and isinstance(kernel, str):
        if request.backward:
            return _declined("gradients under torch.compile", InputError)
        chosen = graph_kernel(request, device, kernel, switch_id)
        if isinstance(chosen, str):
            return Declined(chosen, KernelUnavailableError(chosen))
        return chosen
    try:
        return select(request, read_machine(device), kernel)
    except KernelUnavailableError as error:
        return Declined(error.summary, error)


def _declined(reason: str, error: type[InputError]) -> Declined:
    return Declined(reason, error(f"{reason}; no kernel takes this"))


def _plan(
    mask: Tensor | PackingPlan | None,
    sizes: tuple[int, int, int, int],
    axes_2d: Axes2D,
    seqused: bool,
    pack_queries: bool,
    find_plan: FindPlan | None,
) -> Plan:
    if isinstance(mask, PackingPlan):
        return mask
    if mask is None:
        return _UNMASKED
    in_graph = _is_recorded(mask)
    if in_graph and not seqused:
        return Opaque("mask in a graph, on a kernel without seqused_k")

    pack_queries = pack_queries and sizes[2] == sizes[3]
    options = {"seqused": seqused, "static": in_graph, "pack_queries": pack_queries}

    def make() -> Plan:
        return try_plan(mask, sizes, axes_2d=axes_2d, **options)

    if find_plan is None or in_graph:
        return make()
    return find_plan(mask, (sizes, axes_2d, seqused, pack_queries), make)


def _is_recorded(mask: Tensor) -> bool:
    """Whether the call becomes part of a graph, which can read nothing back from the device.

    Nor may it hold a plan that was made from what the mask contained at some other time.
    """
    if torch.compiler.is_compiling():
        return True
    return mask.is_cuda and torch.cuda.is_current_stream_capturing()


def _default(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> Tensor:
    """PyTorch's attention on the same tensors."""
    if mask is not None:
        mask = mask if mask.is_floating_point() else mask.bool()
        mask = mask[None] if mask.ndim == 1 else mask
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask
    heads_first = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return heads_first.transpose(1, 2)
