"""START HERE. One attention call, from q, k, v and a mask to the output, on one screen.

Axis letters, here and everywhere: B batch, H query heads, Hk key and value heads, Sq and Sk
lengths, D head size (Dv of v), T packed tokens. Layout (B, S, H, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3.errors import (
    FA3Error,
    InputError,
    KernelUnavailableError,
    MaskError,
)
from diffusers_fa3.inputs import check_inputs, under_autocast, why_unreadable
from diffusers_fa3.kernels import (
    GraphKernel,
    Kernel,
    KernelChoice,
    Request,
    check_out,
    graph_kernel,
    in_functional,
    is_functional,
    read_machine,
    select,
    without_keys,
)
from diffusers_fa3.masks import (
    Axes2D,
    FindPlan,
    Opaque,
    PackingPlan,
    Plan,
    PlanCall,
    try_plan,
)
from diffusers_fa3.options import Options

_UNMASKED = PackingPlan("dense", 0, 0, 0)
"""The plan of every call without a mask. Its sizes are not read on route dense."""

# Asked in every call; whether autocast is on for one device would cost five times as much.
_tracing = torch._C._get_tracing_state
_any_autocast = torch._C._is_any_autocast_enabled


class Served(NamedTuple):
    """A call that a kernel served. A tuple, since tuples are made fast."""

    out: Tensor
    lse: Tensor | None
    kernel: str
    route: str
    lead: float = 0.0
    """Where `kernel="fastest"` chose this kernel: how many times as long the second best takes."""


@dataclass(frozen=True, slots=True)
class Declined:
    """A call that no kernel took: the reason, and the error to raise if a kernel was required."""

    reason: str
    error: FA3Error
    lead: float = 0.0
    """Where `kernel="fastest"` chose PyTorch's attention: how many times as long the second best
    takes. It is no error then."""


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
    out_is_ours: bool = False,
    return_lse: bool = False,
) -> Served | Declined:
    """One attention call, of `attention` or of a processor.

    Arguments are those of `attention`, and: whether a 2-D mask is (B, Sk) or (Sq, Sk) (`axes_2d`);
    whether self attention leaves padded tokens out as queries, too (`pack_queries`); what finds the
    plan of an earlier layer (`find_plan`); for whom compiled graphs count calls (`switch_id`);
    whether `out` was made for this call, so that nothing need be checked (`out_is_ours`).
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and _tracing() is not None:  # sizes are tensors there
        return no_kernel_takes("torch.jit.trace records PyTorch's attention", InputError)
    if _any_autocast():
        q, k, v = under_autocast(q, k, v)
    sizes = check_inputs(q, k, v, mask, causal)
    if out is not None and not out_is_ours:
        check_out(out, q, v, others=(k, mask) if isinstance(mask, Tensor) else (k,))
    head_dim = q.shape[-1]
    if 0 in sizes or head_dim == 0:
        return Served(*without_keys(q, k, v, out, return_lse), "none", "empty")

    # Who can serve this call?
    request = Request(
        q.dtype,
        head_dim,
        v.shape[-1],
        varlen=mask is not None,
        seqused_k=isinstance(mask, PackingPlan) and mask.lengths.seqused_k is not None,
        lse=return_lse,
        backward=torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    if not compiling and in_functional() and is_functional(q, k, v):
        request = request._replace(functional=True)
    chosen = _choose(request, q.device, kernel, switch_id, compiling)
    if isinstance(chosen, Declined):
        return chosen

    # What does the mask mean, and which plan follows?
    plan: Plan
    if mask is None:
        plan = _UNMASKED
    elif isinstance(mask, PackingPlan):
        plan = mask
    else:
        plan = plan_of(mask, sizes, axes_2d, chosen.seqused_k, pack_queries, find_plan)
    if isinstance(plan, Opaque):
        return no_kernel_takes(plan.reason, MaskError)

    if plan.route == "packed" and not (plan.lengths.max_seqlen_q and plan.lengths.max_seqlen_k):
        return Served(*without_keys(q, k, v, out, return_lse), "none", "empty")
    if plan.window != (-1, -1):
        # The mask is a sliding window, which not every build has: choose again.
        request = request._replace(window=True)
        chosen = _choose(request, q.device, kernel, switch_id, compiling)
        if isinstance(chosen, Declined):
            return chosen

    # The kernel, between pack and unpack; twice where some queries see causally and others not.
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


def _choose(
    request: Request, device: torch.device, kernel: KernelChoice, switch_id: int, compiling: bool
) -> Kernel | GraphKernel | Declined:
    if compiling and isinstance(kernel, str):
        if request.backward:
            return no_kernel_takes("gradients under torch.compile", InputError)
        chosen = graph_kernel(request, device, kernel, switch_id)
        if isinstance(chosen, str):
            return Declined(chosen, KernelUnavailableError(chosen))
        return chosen
    try:
        return select(request, read_machine(device), kernel)
    except KernelUnavailableError as error:
        return Declined(error.summary, error)


def no_kernel_takes(reason: str, error: type[InputError] = InputError) -> Declined:
    """The answer to a call that only PyTorch's attention can serve."""
    words = (
        f"{reason}; no kernel takes this. Call torch.nn.functional.scaled_dot_product_attention, "
        'or in a layer allow it by fallback="warn"'
    )
    return Declined(reason, error(words))


def plan_of(
    mask: Tensor,
    sizes: tuple[int, int, int, int],
    axes_2d: Axes2D,
    seqused: bool,
    pack_queries: bool,
    find_plan: FindPlan | None,
) -> Plan:
    """The plan of a mask for a kernel with or without `seqused_k`; arguments as of `attend`."""
    if unreadable := why_unreadable(mask):
        return Opaque(unreadable)
    in_graph = _is_recorded(mask)
    if in_graph and not seqused:
        return Opaque("mask in a graph, on a kernel without seqused_k")

    pack_queries = pack_queries and sizes[2] == sizes[3]
    options = {"seqused": seqused, "static": in_graph, "pack_queries": pack_queries}

    def make() -> Plan:
        return try_plan(mask, sizes, axes_2d=axes_2d, **options)

    if find_plan is None or in_graph:
        return make()
    return find_plan(mask, PlanCall(sizes, axes_2d, seqused, pack_queries), make)


def _is_recorded(mask: Tensor) -> bool:
    """Whether the call becomes part of a compiled or CUDA graph.

    A graph cannot read the mask, nor use a plan of what the mask contained at another time.
    """
    if torch.compiler.is_compiling():
        return True
    return mask.is_cuda and torch.cuda.is_current_stream_capturing()


def default_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> Tensor:
    """PyTorch's attention on the same tensors, (B, S, H, D)."""
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
        enable_gqa=bool(q.shape[2] != k.shape[2]),  # a tensor, in torch.jit.trace
    )
    return heads_first.transpose(1, 2)
