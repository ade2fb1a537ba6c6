"""The mask of all ranks' keys, put together once per forward and mask.

A part judged by itself would be wrong: an additive mask of a rank whose keys are all padding, say,
seems to average. So the raw values travel, and their meaning is read from the whole, which is the
same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_fa3.errors import ParallelError
from diffusers_fa3.masks import Axes2D, OuterMask, as_4d, is_in_factors
from diffusers_fa3.parallel.exchange import Axes, of_everyone


def part_of(
    mask: Tensor,
    sizes: tuple[int, int, int, int],
    axes_2d: Axes2D,
    lengths: Sequence[int],
    k_tokens: Sequence[int],
    in_order: bool,
) -> Tensor:
    """A rank's mask, (B or 1, H or 1, 1, S); or an `OuterMask`.

    S is the length of this rank's keys; or, where a plan knows the order of all tokens
    (`in_order`), of all keys, as one process has them. `lengths` of the masks and `k_tokens` are
    those of all ranks, so that all decide alike.

    Raises:
        ParallelError: a mask that cannot be put together: its length is another, or it depends on
            the query and is not kept in factors.
        MaskError: the mask does not broadcast to (B, H, Sq, S).
    """
    batch, heads, q_len, k_len = sizes
    others = [(n, own) for n, own in zip(lengths, k_tokens) if n not in (1, own)]
    if others:
        if not in_order or any(n != sum(k_tokens) for n in lengths):
            raise _other_length(*others[0])
        k_len = mask.shape[-1]
    if is_in_factors(mask):
        return mask
    if mask.ndim > 2 or (mask.ndim == 2 and axes_2d == "qk"):
        q_len = mask.shape[-2]  # of whatever queries: an expanded axis says nothing of them
    compact = as_4d(mask, (batch, heads, q_len, k_len), axes_2d)
    if compact.shape[2] > 1:
        raise ParallelError(
            "context parallelism: a mask of queries and keys; a rank has its queries' view of its "
            f"own keys only. Got {tuple(mask.shape)}; pass a mask of keys, (B, Sk), or run this "
            "model on one GPU"
        )
    return compact


def whole_mask(
    part: Tensor,
    axes: Axes,
    q_tokens: Sequence[int],
    k_tokens: Sequence[int],
    segments: Sequence[Sequence[int]],
) -> Tensor:
    """The mask of all keys in the order of the ranks, (B or 1, H or 1, 1, sum of `k_tokens`).

    Of an `OuterMask`, one of the queries that this rank attends with, and all keys.

    Args:
        part: from `part_of`.
        axes: how the sequence is split.
        q_tokens: each rank's number of queries.
        k_tokens: each rank's number of keys.
        segments: for a mask of all keys as one process has them: the lengths on each rank of what
            the sequence is made of, such as text and image, in that order; empty if unknown.

    Raises:
        ParallelError: a mask of all keys, of which the order is unknown.
    """
    row = slice(axes.ring.rank * axes.ulysses.size, (axes.ring.rank + 1) * axes.ulysses.size)
    if isinstance(part, OuterMask):
        queries, keys = part.factors
        all_queries = _in_order_of_ranks(queries.transpose(2, 3), axes, q_tokens, segments)
        mine = torch.split(all_queries, list(q_tokens), -1)[row]
        all_keys = _in_order_of_ranks(keys, axes, k_tokens, segments)
        return OuterMask(torch.cat(mine, -1).transpose(2, 3), all_keys)
    return _in_order_of_ranks(part, axes, k_tokens, segments)


def _in_order_of_ranks(
    part: Tensor, axes: Axes, tokens: Sequence[int], segments: Sequence[Sequence[int]]
) -> Tensor:
    length, own = part.shape[-1], tokens[axes.everyone.rank]
    if length == own:
        return of_everyone(part, axes, tokens)
    if length != sum(tokens) or length != sum(map(sum, segments)):
        raise _other_length(length, own)
    # The whole is here already: a sequence [text, image] is [text 0, image 0, text 1, ...].
    ends = torch.split(part, [sum(each) for each in segments], -1)
    parts = [torch.split(whole, list(each), -1) for whole, each in zip(ends, segments)]
    return torch.cat([each[rank] for rank in range(len(tokens)) for each in parts], -1)


def _other_length(length: int, own: int) -> ParallelError:
    return ParallelError(
        f"context parallelism: a mask of {length} keys on a rank that has {own}; split it as the "
        "tokens are (each rank passes its own part: [text part, image part])"
    )
