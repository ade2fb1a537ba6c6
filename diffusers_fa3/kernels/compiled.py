"""The kernel call as one torch.library op, which torch.compile sees in place of a kernel.

The raw ops of FlashAttention builds have no fake implementation, so torch.compile cannot trace
them. This op has one. It writes into `out` and returns only the log-sum-exp, since an op must not
return one of its arguments. Eager calls do not use this op.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from operator import index
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffusers_fa3.errors import FallbackWarning, KernelUnavailableError
from diffusers_fa3.kernels.adapt import refuse
from diffusers_fa3.kernels.contract import Forward, Request, Result, read_machine
from diffusers_fa3.kernels.installed import kernel_named, select
from diffusers_fa3.kernels.out import out_dtype
from diffusers_fa3.options import DENSE, Lengths, Options

Function = TypeVar("Function", bound=Callable[..., Any])

while_tracing: Callable[[Function], Function] = torch.compiler.assume_constant_result
"""Decorates a function of constants that Dynamo runs as it traces, once, and not in the graph."""

executed: Counter[tuple[int, str, str]] = Counter()
"""Calls that compiled graphs made, by (`Settings.switch_id` or 0 if none, kernel, route)."""

declined: Counter[tuple[int, str]] = Counter()
"""Calls compiled as the default attention, by (`switch_id`, reason); one per compilation."""


@torch.library.custom_op("diffusers_fa3::forward_into", mutates_args={"out"})
def forward_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    return_lse: bool,
    kernel: str,
    switch_id: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_k: Tensor | None,
) -> Tensor:
    """`Forward` of the kernel named `kernel`, into `out`; returns the log-sum-exp, or an empty one.

    Padding in v must be safe (see `Forward`). Each run is counted in `executed`.
    """
    route = "packed" if cu_seqlens_q is not None else "dense" if seqused_k is None else "static"
    executed[switch_id, kernel, route] += 1
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k)
    _, lse = kernel_named(kernel).forward(
        q,
        k,
        v,
        Options(softmax_scale, causal, (window_left, window_right)),
        DENSE if route == "dense" else lengths,
        padding_is_safe=True,
        out=out,
        return_lse=return_lse,
    )
    return q.new_empty(0, dtype=torch.float32) if lse is None else lse


@forward_into.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, return_lse: bool, *options: Any) -> Tensor:
    *batch, length, heads, _ = q.shape
    return q.new_empty((*batch, heads, length) if return_lse else 0, dtype=torch.float32)


@while_tracing
def note_declined(switch_id: int, reason: str, warn: bool) -> None:
    """Count a call that the graph being traced gives to the default attention; warn once."""
    declined[switch_id, reason] += 1
    if warn and declined[switch_id, reason] == 1:
        warnings.warn(f"compiled as the default attention: {reason}", FallbackWarning, stacklevel=2)


class GraphKernel(NamedTuple):
    """A kernel in a graph being traced, with the fields of a `Kernel` that `attend` uses."""

    name: str
    seqused_k: bool
    reads_padding: bool
    forward: Forward


def graph_kernel(
    request: Request, device: torch.device, kernel: str, switch_id: int
) -> GraphKernel | str:
    """`select` for a graph being traced: the kernel, or the reason why none serves.

    Dynamic head sizes are fixed to those that the graph is traced with, to choose a kernel.
    """
    request = request._replace(
        head_dim=index(request.head_dim), head_dim_v=index(request.head_dim_v)
    )
    chosen = _choose(device, kernel, *request)
    if isinstance(chosen, str):
        return chosen
    name, seqused_k, reads_padding = chosen
    return GraphKernel(name, seqused_k, reads_padding, _traceable(name, switch_id))


@while_tracing
def _choose(device: torch.device, kernel: str, *request: Any) -> tuple[str, bool, bool] | str:
    """`select` on constants, for Dynamo: `Request` fields in, first `GraphKernel` fields out."""
    try:
        chosen = select(Request(*request), read_machine(device), kernel)
    except KernelUnavailableError as error:
        return error.summary
    return chosen.name, chosen.seqused_k, chosen.reads_padding


def _traceable(kernel: str, switch_id: int) -> Forward:
    """`Forward` of the kernel named `kernel` through the op, with scale, causal and window only."""

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
        refuse(kernel, options.beyond("causal", "window"))
        if out is None:
            out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype(q))
        lse = forward_into(
            q,
            k,
            v,
            out,
            return_lse,
            kernel,
            switch_id,
            options.softmax_scale,
            options.causal,
            *options.window,
            *lengths,
        )
        return out, lse if return_lse else None

    return forward
