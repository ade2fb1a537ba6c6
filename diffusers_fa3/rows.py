"""A mask that depends on the query, row by row: a band, or groups of queries that see alike.

A group is a sequence of its own to a variable-length kernel. So all that falls into few groups can
be packed: segments, blocks of frames, a causal text before an image that sees everything. Queries
of which each sees one key more than the one before it are a group as well, a causal one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_fa3.meaning import Band, Opaque, Sequence, Sequences

MOST_RUNS = 1024
"""Sequences of one mask, beyond which it is no pattern but scatter."""

COPIES = 2
QUERIES_PER_COPY = 32
"""A key is copied for each group that sees it. That pays where all keys together are copied no more
than `COPIES` times, or where a copy serves so many queries that the attention dwarfs it."""

BLOCK = 2**26
"""Elements of the mask that are looked at in one go: what is laid out besides it stays small."""

NEW, SAME, GROWN = 0, 1, 2
"""What a row is to the one above it: another one, the same, or that and one key behind its last."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Of each row of a mask, (B, Sq) on the host."""

    first: Tensor
    """Its first key, 0 where there is none."""
    last: Tensor
    """Its last key, Sk - 1 where there is none."""
    count: Tensor
    changed: Tensor
    """In how many keys it differs from the row above; 0 in the first row."""


def read_rows(seen: Tensor) -> Band | Sequences | Opaque:
    """What a (B or 1, Sq, Sk) bool mask means that differs from query to query.

    Reads twice from the mask's device: of every row where it begins, ends and changes, and one row
    of each run of rows that are alike.
    """
    rows = _read(seen)
    return _band(rows, seen.shape[-1]) or _sequences(rows, seen)


def _read(seen: Tensor) -> _Rows:
    samples, q_len, k_len = seen.shape
    step = max(1, BLOCK // max(1, samples * k_len))
    blocks = []
    for start in range(0, q_len, step):
        block = seen[:, start : start + step]
        above = seen[:, max(start - 1, 0) : start + block.shape[1] - 1]
        above = above if start else torch.cat([block[:, :1], above], dim=1)
        numbers = block.to(torch.uint8)
        facts = (
            numbers.argmax(-1),
            k_len - 1 - numbers.flip(-1).argmax(-1),
            numbers.sum(-1),
            (block != above).sum(-1),
        )
        blocks.append(torch.stack(facts))
    return _Rows(*torch.cat(blocks, dim=-1).cpu())


def _band(rows: _Rows, k_len: int) -> Band | None:
    q_len = rows.count.shape[1]
    if (rows.last - rows.first + 1 != rows.count).any():
        return None
    level = torch.arange(k_len - q_len, k_len)
    left = -1 if not rows.first.any() else int((level - rows.first).max())
    right = -1 if (rows.last == k_len - 1).all() else int((rows.last - level).max())
    first = torch.zeros_like(level) if left < 0 else (level - left).clamp(min=0)
    last = (level * 0 + k_len - 1) if right < 0 else (level + right).clamp(max=k_len - 1)
    return Band(left, right) if ((rows.first == first) & (rows.last == last)).all() else None


def _sequences(rows: _Rows, seen: Tensor) -> Sequences | Opaque:
    samples, q_len, k_len = seen.shape
    starts, causal = _runs(rows)
    if len(starts) > MOST_RUNS:
        return Opaque(f"mask that depends on the query, in {len(starts)} runs of rows")
    ends = torch.cat([starts[1:], torch.tensor([samples * q_len])])
    last_rows = seen[(ends - 1) // q_len, (ends - 1) % q_len].cpu()

    groups: dict[tuple[int, bytes, int], list[Tensor]] = {}
    for start, end, grows, row in zip(starts.tolist(), ends.tolist(), causal.tolist(), last_rows):
        sample = start // q_len
        # A causal run is a group of its own; others join the group that sees the same keys.
        key = (sample, row.numpy().tobytes(), start if grows else -1)
        groups.setdefault(key, [row]).append(torch.arange(start, end) - sample * q_len)
    found = [
        Sequence(sample, torch.cat(queries), row.nonzero().flatten(), causal=begins >= 0)
        for (sample, _, begins), (row, *queries) in groups.items()
        if row.any()
    ]
    copied = sum(len(s.keys) for s in found)
    seen_in_all = sum(len(s.queries) * len(s.keys) for s in found)
    if copied > max(COPIES * samples * k_len, seen_in_all // QUERIES_PER_COPY):
        return Opaque("mask that depends on the query: packing would copy too many keys")
    return Sequences(tuple(found), samples)


def _runs(rows: _Rows) -> tuple[Tensor, Tensor]:
    """Where runs of rows begin, as positions in B * Sq, and which of them are causal."""
    change = torch.full_like(rows.count, NEW)
    grown = (rows.count.diff() == 1) & (rows.last.diff() > 0) & (rows.changed[:, 1:] == 1)
    change[:, 1:][rows.changed[:, 1:] == 0] = SAME
    # Above a first key there is no last one to compare with.
    change[:, 1:][grown | ((rows.count[:, :-1] == 0) & (rows.count[:, 1:] == 1))] = GROWN
    before = torch.cat([torch.full_like(change[:, :1], NEW), change[:, :-1]], dim=1)
    begins = (change == NEW) | ((change != before) & (before != NEW))
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    second = torch.cat([change.flatten()[1:], torch.tensor([NEW])])[starts]
    continues = ~torch.cat([begins.flatten()[1:], torch.tensor([True])])[starts]
    return starts, (second == GROWN) & continues
