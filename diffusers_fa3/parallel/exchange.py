"""What ranks send each other: tokens for heads and back, keys of a ring, parts of a mask.

Everything here is torch.distributed; nothing knows of diffusers or of attention. P ranks are
numbered `ring * U + ulysses`, U being the size of the group `ulysses` and R that of `ring`. A
sequence is split over all of them, in that order. Layout (B, S, H, D), as everywhere.

Where no gradient is asked for, eager calls are torch.distributed's plain collectives. In a graph
they are the functional ones, which torch.compile can trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed import distributed_c10d

from diffusers_fa3.kernels import needs_grad

sent: Counter[str] = Counter()
"""Collectives that this process took part in, and the bytes that it sent to other ranks: "mask",
"sizes" or "tokens", and the same with " bytes". Calls in graphs are not counted."""


class Group(NamedTuple):
    """Ranks that exchange something, and the place of this one among them.

    A tuple, as `Axes` is: torch.compile makes them of constants.
    """

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Group:
        """The record of a process group."""
        return cls(group.group_name, dist.get_world_size(group), dist.get_rank(group))


class Axes(NamedTuple):
    """How a sequence is split: over a ring of groups that trade tokens for heads."""

    ulysses: Group
    ring: Group
    everyone: Group
    uneven: bool
    """Whether ranks may have different numbers of tokens and heads (diffusers' `*_anything`)."""

    def row(self, sizes: Sequence[int]) -> Sequence[int]:
        """Of one size per rank, those of this rank's group `ulysses`."""
        start = self.ring.rank * self.ulysses.size
        return sizes[start : start + self.ulysses.size]


# Asked in every call of a layer whose model is unknown.
distributed: Callable[[], bool] = dist.is_initialized if dist.is_available() else lambda: False

# torch 2.13 has new names for these, and warns of the old ones.
_gather_parts: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_gather_traced: Any = getattr(functional, "all_gather_single", functional.all_gather_tensor)


def share(units: int, group: Group) -> list[int]:
    """How many of so many heads each rank of a group gets; the first ranks get the rest."""
    each, rest = divmod(units, group.size)
    return [each + (rank < rest) for rank in range(group.size)]


def sizes_of_all(sizes: Sequence[int], axes: Axes) -> list[tuple[int, ...]]:
    """For each of this rank's sizes, those of all ranks. One message, and one read of it."""
    if not axes.uneven:
        return [(size,) * axes.everyone.size for size in sizes]
    group = _resolve(axes.everyone)
    on_host = "cpu" in str(dist.get_backend(group)) or dist.get_backend(group) == "gloo"
    device = torch.device("cpu") if on_host else torch.accelerator.current_accelerator()
    mine = torch.tensor(sizes, dtype=torch.int64, device=device)
    _count("sizes", mine.nbytes * (axes.everyone.size - 1))
    rows = mine.new_empty(axes.everyone.size * len(sizes))
    _gather_parts(rows, mine, group=group)
    return [tuple(column) for column in zip(*rows.view(axes.everyone.size, -1).tolist())]


def tokens_for_heads(
    tensors: Sequence[Tensor], axes: Axes, tokens: Sequence[int], units: int
) -> tuple[Tensor, ...]:
    """Give the tokens of this rank, get those of all ranks of group `ulysses` for some heads.

    Args:
        tensors: (B, S, H, D), with any H; of one S and D.
        axes: who takes part.
        tokens: S of each rank of the group.
        units: heads are handed out in so many parts, so that queries stay with their keys.

    Returns:
        (B, sum of `tokens`, h, D), h of H heads. Views of what arrived, in one piece: token,
        sample, head.
    """
    group = axes.ulysses
    if group.size == 1:
        return tuple(tensors)
    batch, head_dim = tensors[0].shape[0], tensors[0].shape[3]
    if axes.uneven:
        shares = [[n * (x.shape[2] // units) for n in share(units, group)] for x in tensors]
        mine = [heads[group.rank] for heads in shares]
        by_rank = (x.transpose(0, 1).split_with_sizes(n, 2) for x, n in zip(tensors, shares))
        outgoing = [torch.cat(parts, 2).flatten() for parts in zip(*by_rank)]
        each = batch * sum(mine) * head_dim
        send = [part.shape[0] for part in outgoing]
        receive = [length * each for length in tokens]
        arrived = _all_to_all(torch.cat(outgoing), group, receive, send)
    else:
        mine = [x.shape[2] // group.size for x in tensors]
        # (to rank, token, sample, head, D): the copy is the one that the exchange needs anyway
        whole = torch.cat([_by_rank(x, group.size) for x in tensors], 3).contiguous()
        arrived = _all_to_all(whole.flatten(0, 1), group)
    arrived = arrived.view(sum(tokens), batch, sum(mine), head_dim)
    return tuple(x.transpose(0, 1) for x in arrived.split_with_sizes(mine, 2))


def _by_rank(x: Tensor, ranks: int) -> Tensor:
    """(B, S, H, D) as (rank, S, B, h, D)."""
    batch, length, heads, head_dim = x.shape
    return x.reshape(batch, length, ranks, heads // ranks, head_dim).permute(2, 1, 0, 3, 4)


def heads_for_tokens(
    out: Tensor, axes: Axes, tokens: Sequence[int], heads: int, units: int
) -> Tensor:
    """The way back: (B, sum of `tokens`, h, D) of some heads to (B, S, H, D) of this rank's tokens.

    No copy is made on the way out if `out` is a view of (S, B, h, D) memory.
    """
    group = axes.ulysses
    if group.size == 1:
        return out
    batch, head_dim = out.shape[0], out.shape[3]
    rows = out.transpose(0, 1).contiguous()
    if not axes.uneven:
        arrived = _all_to_all(rows, group)
        by_rank = arrived.view(group.size, -1, batch, heads // group.size, head_dim)
        return by_rank.permute(2, 1, 0, 3, 4).flatten(2, 3).contiguous()
    own = tokens[group.rank]
    each = batch * head_dim
    shares = [n * (heads // units) for n in share(units, group)]
    arrived = _all_to_all(
        rows.flatten(),
        group,
        [own * each * h for h in shares],
        [length * each * out.shape[2] for length in tokens],
    )
    ends = [0, *accumulate(own * each * h for h in shares)]
    parts = [
        arrived[a:b].view(own, batch, h, head_dim) for (a, b), h in zip(pairwise(ends), shares)
    ]
    return torch.cat(parts, 2).transpose(0, 1).contiguous()


def of_the_ring(tensors: Sequence[Tensor], axes: Axes, tokens: Sequence[int]) -> tuple[Tensor, ...]:
    """The keys of all groups of a ring: (B, S, H, D) to (B, sum of `tokens`, H, D).

    `tensors` have one S and D; `tokens` is S of each rank of the ring. What comes back are views
    of what arrived, in one piece: token, sample, head.
    """
    if axes.ring.size == 1:
        return tuple(tensors)
    rows = torch.cat([x.transpose(0, 1) for x in tensors], 2).contiguous()
    arrived = _gather(rows, axes.ring, tokens if axes.uneven else None)
    return tuple(
        x.transpose(0, 1) for x in arrived.split_with_sizes([x.shape[2] for x in tensors], 2)
    )


def of_everyone(part: Tensor, axes: Axes, tokens: Sequence[int]) -> Tensor:
    """A mask's parts of all ranks, end to end on the last axis; `tokens` is its length on each."""
    rows = part.movedim(-1, 0).contiguous()
    numbers = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    arrived = _gather(numbers, axes.everyone, tokens if axes.uneven else None, "mask")
    return arrived.to(rows.dtype).movedim(0, -1).contiguous()


def _gather(
    rows: Tensor, group: Group, tokens: Sequence[int] | None, what: str = "tokens"
) -> Tensor:
    """`rows` of all ranks of a group, end to end; `tokens` are their lengths where they differ."""
    if needs_grad(rows):
        lengths = [rows.shape[0]] * group.size if tokens is None else list(tokens)
        gathered: Tensor = _Gather.apply(rows, group, lengths, tokens is not None)  # type: ignore[no-untyped-call, unused-ignore]  # torch gives it no types
        return gathered
    if tokens is not None:
        # A gather of unequal parts is not in every backend; sending all the same to each is.
        copies = rows.expand(group.size, *rows.shape).flatten(0, 1)
        return _all_to_all(copies, group, list(tokens), [rows.shape[0]] * group.size, what)
    if torch.compiler.is_compiling():
        traced: Tensor = _gather_traced(rows, 0, group.name)
        return traced
    _count(what, rows.nbytes * (group.size - 1))
    arrived = rows.new_empty((group.size * rows.shape[0], *rows.shape[1:]))
    _gather_parts(arrived, rows, group=_resolve(group))
    return arrived


def _all_to_all(
    rows: Tensor,
    group: Group,
    receive: list[int] | None = None,
    send: list[int] | None = None,
    what: str = "tokens",
) -> Tensor:
    """Rows for each rank of a group, end to end, against theirs for this one."""
    if needs_grad(rows):
        exchanged: Tensor = _AllToAll.apply(rows, group, receive, send)  # type: ignore[no-untyped-call, unused-ignore]  # torch gives it no types
        return exchanged
    if torch.compiler.is_compiling():
        return functional.all_to_all_single(rows, receive, send, group.name)  # type: ignore[arg-type]  # a NewType of str
    length = rows.shape[0]
    if send is None or receive is None:
        _count(what, rows.nbytes // group.size * (group.size - 1))
        arrived = rows.new_empty(rows.shape)
    else:
        own = send[group.rank]
        _count(what, rows.nbytes // max(length, 1) * (length - own))
        arrived = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows, receive, send, group=_resolve(group))
    return arrived


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: Group, receive: list[int] | None, send: list[int] | None
    ) -> Tensor:
        ctx.way_back = (group, send, receive)
        return _all_to_all(rows, group, receive, send)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_to_all(grad.contiguous(), *ctx.way_back), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, lengths: list[int], uneven: bool) -> Tensor:
        ctx.group, ctx.lengths = group, lengths
        return _gather(rows, group, lengths if uneven else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Each rank's own rows were used on every rank: it gets their gradients and adds them."""
        group, lengths = ctx.group, ctx.lengths
        own = lengths[group.rank]
        arrived = _all_to_all(grad.contiguous(), group, [own] * group.size, lengths)
        return arrived.view(group.size, own, *grad.shape[1:]).sum(0), None, None, None


def _resolve(group: Group) -> Any:
    return distributed_c10d._resolve_process_group(group.name)  # type: ignore[attr-defined, arg-type]  # torch hides it; a NewType of str


def _count(what: str, size: int) -> None:
    sent[what] += 1
    sent[f"{what} bytes"] += size
