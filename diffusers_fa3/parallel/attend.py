"""One attention call of tokens that are split over ranks.

Each rank is given what one process would have had: all tokens of some heads, or its own queries
and all keys, in the order of the ranks. Then the way of `attention.py` is gone, default included.
No log-sum-exp is merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from diffusers_fa3.attention import (
    Declined,
    Served,
    attend,
    default_attention,
)
from diffusers_fa3.errors import ParallelError
from diffusers_fa3.fastest import FASTEST, attend_fastest
from diffusers_fa3.inputs import check_inputs, under_autocast
from diffusers_fa3.kernels import KernelChoice, in_functional, is_functional, needs_grad, out_dtype
from diffusers_fa3.masks import Axes2D, FindPlan, Plan, PlanCall, try_plan
from diffusers_fa3.parallel.exchange import (
    Axes,
    heads_for_tokens,
    of_the_ring,
    share,
    sizes_of_all,
    tokens_for_heads,
)
from diffusers_fa3.parallel.whole_mask import part_of, whole_mask

Value = TypeVar("Value")


class Memory(NamedTuple):
    """What a layer remembers of this forward, so that masks travel and are read once."""

    whole: Callable[[Tensor, object, Callable[[], Tensor]], Tensor]
    """(a rank's mask, what else the whole depends on, a function that gathers it) -> the whole."""
    plan: FindPlan


def attend_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    axes: Axes,
    *,
    scale: float | None,
    kernel: KernelChoice,
    axes_2d: Axes2D,
    pack_queries: bool,
    switch_id: int,
    segments: Sequence[int] | None = (),
    first: int = 0,
    memory: Memory,
    decline: Callable[[Declined], None],
) -> tuple[Tensor, Served | None]:
    """Attention of this rank's queries over the keys of all ranks: (B, Sq, H, Dv).

    Arguments are those of `attend`, for this rank's tokens, and: how they are split (`axes`); what
    the sequence is made of (`segments`, see `whole_mask`; empty if no plan knows, None if only an
    earlier layer could tell); how many keys, the first, every rank has (`first`); what was found
    for an earlier layer (`memory`); what to do where no kernel takes the call (`decline`), before
    PyTorch's attention serves it on the whole tensors.

    Returns:
        The result, and how a kernel served; None if PyTorch's attention did.

    Raises:
        ParallelError, InputError: a call that cannot be split exactly, before anything is sent that
            another rank would wait for.
    """
    _refuse(q, k, v, mask, axes, first)
    q, k, v = under_autocast(q, k, v)
    check_inputs(q, k, v, None, False)
    k, v = _enough_heads(q, k, v, axes)
    k_first, v_first = k, v
    if first:
        (k_first, k), (v_first, v) = ((x[:, :first], x[:, first:]) for x in (k, v))

    # The sequence on all ranks, and the mask of all its keys.
    (batch, q_len, heads, _), (_, k_len, units, _) = q.shape, k.shape
    length = 0 if mask is None else mask.shape[-1]
    q_tokens, k_tokens, lengths, *parts = sizes_of_all(
        (q_len, k_len, length, *(segments or ())), axes
    )
    if len({n == 0 for n in lengths}) > 1:
        raise ParallelError(
            "context parallelism: a mask on some ranks alone; pass one on each, all True where "
            "nothing is hidden"
        )
    whole = None
    if mask is not None:
        in_order = segments is None or bool(segments)
        part = part_of(mask, (batch, heads, q_len, k_len), axes_2d, lengths, k_tokens, in_order)
        by_later_layers = (q_tokens, k_tokens, None)

        def gather() -> Tensor:
            gathered = whole_mask(part, axes, q_tokens, k_tokens, parts)
            if parts:  # later layers may be given text and image as one
                memory.whole(mask, by_later_layers, lambda: gathered)
            return gathered

        call = by_later_layers if segments is None else (q_tokens, k_tokens, *parts)
        whole = memory.whole(mask, call, gather)

    # All tokens of some heads; all keys.
    tokens = axes.row(q_tokens)
    if q_tokens == k_tokens and v.shape[-1] == k.shape[-1]:
        q, k, v = tokens_for_heads((q, k, v), axes, tokens, units)
    else:
        (q,) = tokens_for_heads((q,), axes, tokens, units)
        k, v = _pair(k, v, lambda x: tokens_for_heads(x, axes, axes.row(k_tokens), units))
    by_group = _sums(k_tokens, axes.ulysses.size)
    k, v = _pair(k, v, lambda x: of_the_ring(x, axes, by_group))
    if first:
        k = torch.cat([_of_heads(k_first, 2, axes, units), k], 1)
        v = torch.cat([_of_heads(v_first, 2, axes, units), v], 1)
    idle = q.shape[2] == 0
    if idle:  # a rank without heads decides as the others do, on a head of zeros
        q, k, v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (q, k, v))

    # The way of one process.
    mine = whole
    if whole is not None and whole.shape[1] > 1:
        mine = _of_heads(whole, 1, axes, units)
        mine = whole[:, :1] if idle else mine

    def find_plan(own: Tensor, call: PlanCall, make: Callable[[], Plan]) -> Plan:
        # Whether heads agree is told by all of them, not by those of this rank.
        if whole is None or whole.shape[1] == 1:
            return memory.plan(own, call, make)
        sizes = (batch, heads, *call.sizes[2:])
        told = {"seqused": call.seqused, "static": False, "pack_queries": call.pack_queries}
        return memory.plan(whole, call, lambda: try_plan(whole, sizes, axes_2d="bk", **told))

    rows = None
    if axes.ulysses.size > 1 and not torch.compiler.is_compiling() and not needs_grad(q, k, v):
        # Laid out for the way back, so that the kernel's result need not be copied for it.
        shape = (q.shape[1], batch, q.shape[2], v.shape[3])
        rows = q.new_empty(shape, dtype=out_dtype(q)).transpose(0, 1)
    serve = attend_fastest if kernel == FASTEST else attend
    answer = serve(
        q,
        k,
        v,
        mine,
        scale=scale,
        causal=False,
        kernel=kernel,
        pack_queries=pack_queries,
        find_plan=find_plan,
        switch_id=switch_id,
        out=rows,
        out_is_ours=True,
    )
    if isinstance(answer, Declined):
        decline(answer)
        result = default_attention(q, k, v, mine, scale, False)
    else:
        result = answer.out
    if idle:
        result = result[:, :, :0]
    result = heads_for_tokens(result, axes, tokens, heads, units)
    return result, None if isinstance(answer, Declined) else answer


def _refuse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, axes: Axes, first: int) -> None:
    """Raise for a call that cannot be split, by what is the same on all ranks."""
    if not torch.compiler.is_compiling() and in_functional() and is_functional(q, k, v):
        raise ParallelError(
            "context parallelism: forward-mode derivatives and transforms of torch.func do not go "
            "through the exchange between ranks; run this model on one"
        )
    if axes.uneven and torch.compiler.is_compiling():
        raise ParallelError(
            "context parallelism: ulysses_anything and ring_anything under torch.compile, where "
            "sizes that ranks tell each other cannot be; use ulysses_degree or ring_degree alone"
        )
    if first and mask is not None:
        raise ParallelError(
            "context parallelism: a mask of keys some of which every rank has whole; call without "
            "one, or run this model on one GPU"
        )


def _enough_heads(q: Tensor, k: Tensor, v: Tensor, axes: Axes) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as ranks can share; a few grouped ones are repeated."""
    heads, k_heads, ranks = q.shape[2], k.shape[2], axes.ulysses.size
    if axes.uneven or k_heads % ranks == 0:
        return k, v
    if heads % ranks:
        raise ParallelError(
            f"context parallelism: {heads} heads cannot be split over {ranks} ranks; use "
            "ulysses_anything, or a ring"
        )
    times = ranks // math.gcd(k_heads, ranks)
    return k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)


def _pair(
    k: Tensor, v: Tensor, exchange: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor]:
    """Keys and values after an exchange: in one message where they have one head size."""
    if k.shape[-1] == v.shape[-1]:
        k, v = exchange((k, v))
        return k, v
    return exchange((k,))[0], exchange((v,))[0]


def _sums(sizes: Sequence[int], each: int) -> list[int]:
    return [sum(sizes[i : i + each]) for i in range(0, len(sizes), each)]


def _of_heads(x: Tensor, axis: int, axes: Axes, units: int) -> Tensor:
    """The part of a tensor of all heads that is for this rank's."""
    group = x.shape[axis] // units
    shares = [n * group for n in share(units, axes.ulysses)]
    rank = axes.ulysses.rank
    return x.narrow(axis, sum(shares[:rank]), shares[rank])
