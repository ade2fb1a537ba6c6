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

from diffusers_fa3.masks.meaning import Band, Opaque, Sequence, Sequences

MOST_GROUPS = 1024
"""Sequences of one mask, beyond which it is no pattern but scatter."""

COPIES = 4
QUERIES_PER_COPY = 512
"""A key is copied for each group that sees it: at most so many times on average, and once more for
so many queries of the call. On an H100 (bfloat16, 24 heads of 128, half of all pairs seen) calls of
4,096 tokens and more are 1.6 to 2.5 times as fast as the default at this limit, and break even at
twice the limit; those of 2,048 are 1.3 times as fast, those of 1,024 slower from 3 groups on."""

GPU_BLOCK, CPU_BLOCK = 2**26, 2**22
"""Elements of the mask that are looked at in one go. What is laid out besides it stays small, on a
CPU so small that it is laid out in pages used before: fresh ones take longer than the reading."""


def count_keys(seen: Tensor) -> Tensor:
    """How many keys each row of a (B, Sq, Sk) bool mask sees, (B, Sq)."""
    # A GPU lays bools out as int64 to add them, and a CPU adds them one by one.
    if seen.is_cuda and seen.numel() <= GPU_BLOCK // 8:
        return seen.sum(-1)
    counts = []
    for _, block in blocks(seen):
        words = _words(block)
        # Eight keys at a time, a byte for each, which is full at 256.
        whole = words.shape[-1] // 128 * 128
        lots = words[..., :whole].view(*words.shape[:-1], -1, 128)
        sums = [lots.sum(-1), words[..., whole:].sum(-1, keepdim=True)]
        counts.append(torch.cat(sums, dim=-1).view(torch.uint8).sum(-1))
    return torch.cat(counts, dim=-1)


def read_rows(seen: Tensor, counts: Tensor) -> Band | Sequences | Opaque:
    """What a (B or 1, Sq, Sk) bool mask means that differs from query to query.

    Reads from the mask's device up to four times: where rows change; whether it is the band that
    it looks like; if not, one row of each group; and which of these are causal, as some look.

    Args:
        seen: the mask.
        counts: `count_keys(seen)`.
    """
    ends = seen[0, :: seen.shape[1] - 1]
    changes, counts, ends = _to_host(_changes(seen), counts, ends)
    return _band(seen, counts, ends) or _sequences(seen, changes, counts)


def _to_host(*tensors: Tensor) -> list[Tensor]:
    """Copies in whole numbers: one wait for all of them."""
    joined = torch.cat([x.flatten() for x in tensors]).cpu()
    parts = torch.split(joined, [x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors)]


def blocks(mask: Tensor, overlap: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Rows of a (B, Sq, Sk) mask, as many at a time as a block holds, and where they begin."""
    samples, q_len, k_len = mask.shape
    size = GPU_BLOCK if mask.is_cuda else CPU_BLOCK
    step = max(1, size // (samples * k_len))
    for start in range(0, q_len, step):
        yield start, mask[:, start : start + step + overlap]


def _words(seen: Tensor) -> Tensor:
    """Eight keys to an int64, 0 behind the last one; a view, where a row is of whole words."""
    behind = -seen.shape[-1] % 8
    steps = (*seen.stride()[:-1], seen.storage_offset())
    if not behind and seen.stride(-1) == 1 and not any(step % 8 for step in steps):
        return seen.view(torch.int64)
    return F.pad(seen, (0, behind)).contiguous().view(torch.int64)


def _changes(seen: Tensor) -> Tensor:
    """Which rows differ from the row above, (B, Sq); the first counts as such."""
    words = (_words(block) for _, block in blocks(seen, overlap=1))
    changes = [(block[:, 1:] != block[:, :-1]).any(-1) for block in words]
    return F.pad(torch.cat(changes, dim=-1)[:, : seen.shape[1] - 1], (1, 0), value=True)


def _band(seen: Tensor, counts: Tensor, ends: Tensor) -> Band | None:
    """Guessed from `ends`, the first and the last row."""
    q_len, k_len = seen.shape[1:]
    top, bottom = (row.nonzero().flatten().tolist() for row in ends)
    if not (top and bottom):
        return None
    right = -1 if top[-1] == k_len - 1 else top[-1] - (k_len - q_len)
    left = -1 if bottom[0] == 0 else k_len - 1 - bottom[0]
    level = torch.arange(k_len - q_len, k_len)
    first = torch.zeros_like(level) if left < 0 else (level - left).clamp(min=0)
    last = torch.full_like(level, k_len - 1) if right < 0 else (level + right).clamp(max=k_len - 1)
    if (counts != last - first + 1).any():
        return None
    band = Band(left, right)
    return band if _is_band(seen, band) else None


def _is_band(seen: Tensor, band: Band) -> bool:
    q_len, k_len = seen.shape[1:]
    for start, block in blocks(seen):
        level = k_len - q_len + start
        rows = torch.ones(block.shape[1:], dtype=torch.bool, device=seen.device)
        rows = rows if band.right < 0 else rows.tril_(level + band.right)
        rows = rows if band.left < 0 else rows.triu_(level - band.left)
        words = _words(block)
        if not torch.equal(words, _words(rows).expand_as(words)):
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows `start` to `end` of a sample: the same, or each with one key more than the one above."""

    sample: int
    start: int
    end: int
    keys: int
    """How many the last row sees."""
    causal: bool = False

    def apart(self) -> list[_Run]:
        """The rows of a causal run, each by itself."""
        counts = range(self.keys - (self.end - self.start) + 1, self.keys + 1)
        rows = range(self.start, self.end)
        return [_Run(self.sample, row, row + 1, keys) for row, keys in zip(rows, counts)]


_Groups = dict[tuple[int, bytes, int], list[_Run]]
"""Runs that see alike: of one sample, with the same last row, and a causal one by itself."""


def _sequences(seen: Tensor, changes: Tensor, counts: Tensor) -> Sequences | Opaque:
    runs = _runs(changes, counts, _most_keys(seen))
    if isinstance(runs, Opaque):
        return runs
    groups = _groups(seen, runs)
    # Scatter is known by what is not guessed.
    settled = [same[0] for same in groups.values() if not same[0].causal]
    if refusal := _too_much(seen, settled):
        return refusal

    causal = [(row, run) for (_, row, _), (run, *_) in groups.items() if run.causal]
    wrong = _guessed_wrongly(seen, causal)
    if wrong:
        parts = [run.apart() if run in wrong else [run] for run in runs]
        groups = _groups(seen, [part for run in parts for part in run])
    if refusal := _too_much(seen, [same[0] for same in groups.values()]):
        return refusal
    sequences = [
        Sequence(
            sample,
            torch.cat([torch.arange(run.start, run.end) for run in same]),
            _positions(row),
            same[0].causal,
        )
        for (sample, row, _), same in groups.items()
    ]
    return Sequences(tuple(sequences), len(seen))


def _too_much(seen: Tensor, one_of_each: list[_Run]) -> Opaque | None:
    if len(one_of_each) > MOST_GROUPS:
        return _too_many_groups(len(one_of_each))
    if sum(run.keys for run in one_of_each) > _most_keys(seen):
        return _TOO_MANY_KEYS
    return None


def _most_keys(seen: Tensor) -> int:
    """How many keys all groups together may see."""
    samples, q_len, k_len = seen.shape
    return max(COPIES, q_len // QUERIES_PER_COPY) * samples * k_len


_TOO_MANY_KEYS = Opaque("mask that depends on the query: packing would copy too many keys")


def _too_many_groups(groups: int) -> Opaque:
    return Opaque(f"mask that depends on the query, in {groups} groups of rows")


def _groups(seen: Tensor, runs: list[_Run]) -> _Groups:
    last_rows = seen[[run.sample for run in runs], [run.end - 1 for run in runs]].cpu().numpy()
    groups: _Groups = {}
    for run, row in zip(runs, last_rows):
        group = (run.sample, row.tobytes(), run.start if run.causal else -1)
        groups.setdefault(group, []).append(run)
    return groups


def _positions(row: bytes) -> Tensor:
    return torch.frombuffer(bytearray(row), dtype=torch.bool).nonzero().flatten()


def _runs(changes: Tensor, counts: Tensor, most_keys: int) -> list[_Run] | Opaque:
    """Runs of equal rows; and neighbours of one row each, whose counts rise by one, as one run.

    That such a run is causal is a guess. Rows that see nothing are in none: what q holds there must
    reach no kernel.
    """
    changed = changes.bool()
    alone = changed & F.pad(changed[:, 1:], (0, 1), value=True)
    rises = (counts[:, 1:] == counts[:, :-1] + 1) & (counts[:, :-1] > 0)
    grows = F.pad(alone[:, 1:] & alone[:, :-1] & rises, (1, 0), value=False)
    starts = changed & ~grows
    found = int((starts & (counts > 0)).sum())
    if found > MOST_GROUPS:
        return _too_many_groups(found)
    # Rows that see more keys than others are of another group: scatter goes no further.
    settled = starts & ~F.pad(grows[:, 1:], (0, 1), value=False)
    unlike = [count[row].unique() for count, row in zip(counts, settled)]
    if sum(int(count.sum()) for count in unlike) > most_keys:
        return _TOO_MANY_KEYS

    runs: list[_Run] = []
    for sample, (count, grown) in enumerate(zip(counts.tolist(), grows.tolist())):
        edges = [*starts[sample].nonzero().flatten().tolist(), len(count)]
        for start, end in pairwise(edges):
            causal = end > start + 1 and grown[start + 1]
            if count[end - 1]:
                runs.append(_Run(sample, start, end, count[end - 1], causal))
    return runs


def _guessed_wrongly(seen: Tensor, causal: list[tuple[bytes, _Run]]) -> set[_Run]:
    """Those of the causal runs, each with its last row, which are none.

    The counts of their rows rise by one. So a run is causal if no row sees, of the last row's keys,
    any but the first, as many as it counts, nor any other key. One wait for all runs.
    """
    if not causal:
        return set()
    k_len = seen.shape[-1]
    places = torch.full((len(causal), k_len), k_len, dtype=torch.int32)
    for place, (last_row, run) in zip(places, causal):
        place[_positions(last_row)] = torch.arange(run.keys, dtype=torch.int32)
    places = places.to(seen.device)
    wrong = [_sees_too_early(seen[run.sample], run, p) for p, (_, run) in zip(places, causal)]
    answers: list[bool] = torch.stack(wrong).tolist()
    return {run for answer, (_, run) in zip(answers, causal) if answer}


def _sees_too_early(seen: Tensor, run: _Run, place: Tensor) -> Tensor:
    """Whether a row sees a key before its turn, `place` being each key's in the last row."""
    first = run.keys - (run.end - run.start) + 1
    counts = torch.arange(first, run.keys + 1, dtype=torch.int32, device=seen.device)[:, None]
    rows = seen[None, run.start : run.end]
    early = [
        _words(block & (place >= counts[row : row + block.shape[1]])).any()
        for row, block in blocks(rows)
    ]
    return torch.stack(early).any()
