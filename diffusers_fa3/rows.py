"""A mask that depends on the query, row by row: a band, or groups of queries that see alike.

A group is a sequence of its own to a variable-length kernel. So all that falls into few groups can
be packed: segments, blocks of frames, a causal text before an image that sees everything. Queries
of which each sees one key more than the one before it are a group as well, a causal one.

A band and a causal group are guessed from a few numbers and then compared with the whole mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3.meaning import Band, Opaque, Sequence, Sequences

MOST_GROUPS = 1024
"""Sequences of one mask, beyond which it is no pattern but scatter."""

COPIES = 4
QUERIES_PER_COPY = 512
"""A key is copied for each group that sees it: at most so many times on average, and once more for
so many queries of the call. By an H100's rates (600 TFLOP/s, 2.4 TB/s) copying a key takes as long
as 500 queries take to see it: reckoned, not timed."""

BLOCK = 2**26
"""Elements of the mask that are looked at in one go: what is laid out besides it stays small."""


def count_keys(seen: Tensor) -> Tensor:
    """How many keys each row of a (B, Sq, Sk) bool mask sees, (B, Sq)."""
    if seen.is_cuda:
        return seen.sum(-1)
    # A CPU adds bools one by one: here, eight at a time.
    counts = []
    for _, block in _blocks(seen):
        # A byte for each key: 128 words can be added up before a byte is full.
        words = _words(block)
        sums = words.view(*words.shape[:-1], -1, 128).sum(-1)
        counts.append(sums.view(torch.uint8).sum(-1))
    return torch.cat(counts, dim=-1)


def read_rows(seen: Tensor, counts: Tensor) -> Band | Sequences | Opaque:
    """What a (B or 1, Sq, Sk) bool mask means that differs from query to query.

    Reads from the mask's device a few times: where rows change, one row of each group, and of what
    was guessed whether it is so.

    Args:
        seen: the mask.
        counts: `count_keys(seen)`.
    """
    changes, counts = torch.stack([_changes(seen), counts]).cpu()
    return _band(seen, counts) or _sequences(seen, changes, counts)


def _blocks(seen: Tensor, overlap: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Rows of a mask, as many at a time as a block holds, and where they begin."""
    samples, q_len, k_len = seen.shape
    step = max(1, BLOCK // (samples * k_len))
    for start in range(0, q_len, step):
        yield start, seen[:, start : start + step + overlap]


def _words(seen: Tensor) -> Tensor:
    """Eight keys to an int64, 0 behind the last one: a multiple of 128 words to a row."""
    return F.pad(seen, (0, -seen.shape[-1] % 1024)).contiguous().view(torch.int64)


def _changes(seen: Tensor) -> Tensor:
    """Which rows differ from the row above, (B, Sq); the first counts as such."""
    words = (_words(block) for _, block in _blocks(seen, overlap=1))
    changes = [(block[:, 1:] != block[:, :-1]).any(-1) for block in words]
    return F.pad(torch.cat(changes, dim=-1)[:, : seen.shape[1] - 1], (1, 0), value=True)


def _band(seen: Tensor, counts: Tensor) -> Band | None:
    """Guessed from the first and the last row."""
    q_len, k_len = seen.shape[1:]
    top, bottom = (row.nonzero().flatten().tolist() for row in seen[0, :: q_len - 1].cpu())
    if not (top and bottom):
        return None
    right = -1 if top[-1] == k_len - 1 else top[-1] - (k_len - q_len)
    left = -1 if bottom[0] == 0 else k_len - 1 - bottom[0]
    level = torch.arange(k_len - q_len, k_len)
    first = torch.zeros_like(level) if left < 0 else (level - left).clamp(min=0)
    last = torch.full_like(level, k_len - 1) if right < 0 else (level + right).clamp(max=k_len - 1)
    if (counts != last - first + 1).any() or not _rows_are(seen, first, last):
        return None
    return Band(left, right)


def _rows_are(seen: Tensor, first: Tensor, last: Tensor) -> bool:
    """Whether rows see just the keys from `first` to `last`, both (Sq,)."""
    keys = torch.arange(seen.shape[-1], dtype=torch.int32, device=seen.device)
    first, last = (x.to(seen.device, torch.int32)[:, None] for x in (first, last))
    for start, block in _blocks(seen):
        rows = slice(start, start + block.shape[1])
        band = (keys >= first[rows]) & (keys <= last[rows])
        if not torch.equal(block, band.expand_as(block)):
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows `start` to `end` of a sample: the same, or each with one key more than the one above."""

    sample: int
    start: int
    end: int
    causal: bool

    def apart(self) -> list[_Run]:
        """Its rows, each by itself."""
        return [_Run(self.sample, row, row + 1, False) for row in range(self.start, self.end)]


def _sequences(seen: Tensor, changes: Tensor, counts: Tensor) -> Sequences | Opaque:
    runs = _runs(changes, counts)
    found = _groups(seen, runs)
    if isinstance(found, Opaque):
        return found
    wrong = {
        (group.sample, int(group.queries[0]))
        for group in found
        if group.causal and not _grows_at_the_end(seen[group.sample], group)
    }
    if wrong:
        parts = [run.apart() if (run.sample, run.start) in wrong else [run] for run in runs]
        found = _groups(seen, [part for run in parts for part in run])
    return found if isinstance(found, Opaque) else Sequences(tuple(found), len(seen))


def _groups(seen: Tensor, runs: list[_Run]) -> list[Sequence] | Opaque:
    """Runs that see the same keys as one, unless there is too much of them."""
    samples, q_len, k_len = seen.shape
    if len(runs) > MOST_GROUPS:
        return Opaque(f"mask that depends on the query, in {len(runs)} groups of rows")
    last_rows = seen[[run.sample for run in runs], [run.end - 1 for run in runs]].cpu()

    groups: dict[tuple[int, bytes, int], list[Tensor]] = {}
    for run, row in zip(runs, last_rows):
        # A causal run is a group of its own; others join the group that sees the same keys.
        group = (run.sample, row.numpy().tobytes(), run.start if run.causal else -1)
        groups.setdefault(group, [row]).append(torch.arange(run.start, run.end))
    found = [
        Sequence(sample, torch.cat(queries), row.nonzero().flatten(), causal=start >= 0)
        for (sample, _, start), (row, *queries) in groups.items()
        if row.any()
    ]
    copies = max(COPIES, q_len // QUERIES_PER_COPY)
    if sum(len(s.keys) for s in found) > copies * samples * k_len:
        return Opaque("mask that depends on the query: packing would copy too many keys")
    return found


def _runs(changes: Tensor, counts: Tensor) -> list[_Run]:
    """Runs of equal rows; and neighbours of one row each, whose counts rise by one, as one run.

    That such a run is causal is a guess. Rows that see nothing are in none: what q holds there must
    reach no kernel.
    """
    runs: list[_Run] = []
    for sample, (changed, count) in enumerate(zip(changes.bool(), counts.tolist())):
        starts = [*changed.nonzero().flatten().tolist(), len(count)]
        lone = False
        for start, end in pairwise(starts):
            previous = runs[-1] if runs and lone else None
            lone = end == start + 1
            if previous and lone and 0 < count[previous.end - 1] == count[start] - 1:
                runs[-1] = _Run(sample, previous.start, end, causal=True)
            else:
                runs.append(_Run(sample, start, end, causal=False))
    return runs


def _grows_at_the_end(seen: Tensor, group: Sequence) -> bool:
    """Whether each row of a causal group, whose counts rise by one, sees the first of its keys."""
    k_len, total = seen.shape[-1], len(group.keys)
    place = torch.full((k_len,), k_len, dtype=torch.int32)
    place[group.keys] = torch.arange(total, dtype=torch.int32)
    counts = torch.arange(total - len(group.queries), total, dtype=torch.int32) + 1
    place, counts = place.to(seen.device), counts.to(seen.device)[:, None]
    start = int(group.queries[0])
    rows = seen[None, start : start + len(group.queries)]
    return not any(
        (block & (place >= counts[row : row + block.shape[1]])).any()
        for row, block in _blocks(rows)
    )
