"""The kernel call as one op of torch.library: what torch.compile sees in place of a kernel.

Raw ops of FlashAttention builds say nothing of the shapes they return, so a graph cannot hold them.
This op can: it writes into `out`, which a graph allows an op to do, and returns the log-sum-exp
alone, since an op must not return what it was given. Eager calls do not come this way.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_fa3.errors import FallbackWarning, KernelUnavailableError
from diffusers_fa3.kernels.contract import Request, read_machine
from diffusers_fa3.kernels.installed import kernel_named, select
from diffusers_fa3.kernels.out import out_dtype

executed: Counter[tuple[int, str, str]] = Counter()
"""Calls that compiled graphs made: by switch (see `Settings.switch_id`; 0: none), kernel, route."""

declined: Counter[tuple[int, str]] = Counter()
"""Calls that were compiled as the default attention: by switch, reason; once per compilation."""


@torch.library.custom_op("diffusers_fa3::forward_into", mutates_args={"out"})
def forward_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kernel: str,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    switch_id: int,
    return_lse: bool,
) -> Tensor:
    """`Forward` of the kernel of that name, into `out`; the log-sum-exp, empty if not asked for.

    Padding in v is safe to read. The call is counted for `switch_id` each time it runs.
    """
    route = "packed" if cu_seqlens_q is not None else "dense" if seqused_k is None else "static"
    executed[switch_id, kernel, route] += 1
    _, lse = kernel_named(kernel).forward(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window=(window_left, window_right),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        padding_is_safe=True,
        out=out,
        return_lse=return_lse,
    )
    return q.new_empty(0, dtype=torch.float32) if lse is None else lse


@forward_into.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *options: Any) -> Tensor:
    *_, return_lse = options
    *batch, length, heads, _ = q.shape
    return q.new_empty((*batch, heads, length) if return_lse else 0, dtype=torch.float32)


# Assumed constant, which is to say: run now, while the graph is traced.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
def note_declined(switch_id: int, reason: str, warn: bool) -> None:
    """Count a call that becomes the default attention in the graph that is being traced."""
    declined[switch_id, reason] += 1
    if warn and declined[switch_id, reason] == 1:
        warnings.warn(f"compiled as the default attention: {reason}", FallbackWarning, stacklevel=2)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
def choose_for_graph(
    device: torch.device, kernel: str, *request: Any
) -> tuple[str, bool, bool, str]:
    """`select`, in constants: name, whether it has seqused_k, reads padding, and why there is none.

    Args:
        device: where the call runs.
        kernel: "auto" or a name.
        *request: the fields of a `Request`, which itself cannot be taken out of a graph.
    """
    try:
        chosen = select(Request(*request), read_machine(device), kernel)
    except KernelUnavailableError as error:
        return "", False, False, error.summary
    return chosen.name, chosen.seqused_k, chosen.reads_padding, ""


def traceable(kernel: str, switch_id: int) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`Forward` of the kernel of that name, for a graph that is being traced."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        padding_is_safe: bool = False,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if out is None:
            out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype(q))
        lse = forward_into(
            q,
            k,
            v,
            out,
            kernel,
            softmax_scale,
            causal,
            *window,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_k,
            max_seqlen_q or 0,
            max_seqlen_k or 0,
            switch_id,
            return_lse,
        )
        return out, lse if return_lse else None

    return forward
