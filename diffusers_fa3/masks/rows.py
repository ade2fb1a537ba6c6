"""Masks that depend on the query: a band, or groups of queries that see the same keys.

A variable-length kernel takes each group as one sequence. So a mask with few groups can be packed:
segments, blocks of frames, a causal text before an image that sees everything. Consecutive queries
that each see one key more than the query before also form a group, a causal one.

Bands and causal groups are guessed from a few numbers, then checked against the whole mask.
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
"""The most groups of one mask. A mask with more counts as scattered and is refused."""

COPIES = 4
QUERIES_PER_COPY = 512
"""Packing copies a key once for each group that sees the key. The average number of copies per key
is limited to COPIES, or to one for every QUERIES_PER_COPY queries of the call if that is more. On
an H100 (bfloat16, 24 heads of 128, half of all pairs seen), calls of 4,096 tokens and more are 1.6
to 2.5 times as fast as the default at this limit, and break even at twice the limit; calls of 2,048
tokens are 1.3 times as fast, calls of 1,024 tokens slower from 3 groups on."""

GPU_BLOCK, CPU_BLOCK = 2**26, 2**22
"""How many mask elements are processed at a time, to bound the size of temporaries. On a CPU the
temporaries are small enough to reuse memory pages: fresh pages cost more time than the reading."""


def count_keys(seen: Tensor) -> Tensor:
    """The number of keys that each row of a (B, Sq, Sk) bool mask sees, int64 (B, Sq)."""
    # `sum` on bools converts them to int64 first on a GPU, and adds them one by one on a CPU. So it
    # is used only on a GPU, for masks whose int64 copy is no larger than a block.
    if seen.is_cuda and seen.numel() <= GPU_BLOCK // 8:
        return seen.sum(-1)
    counts = []
    for _, block in blocks(seen):
        words = _words(block)
        # A word is eight keys, one byte each; adding words counts eight keys at a time. At most 128
        # words are added, since a byte overflows at 256.
        whole = words.shape[-1] // 128 * 128
        lots = words[..., :whole].view(*words.shape[:-1], -1, 128)
        sums = [lots.sum(-1), words[..., whole:].sum(-1, keepdim=True)]
        counts.append(torch.cat(sums, dim=-1).view(torch.uint8).sum(-1))
    return torch.cat(counts, dim=-1)


def read_rows(seen: Tensor, counts: Tensor) -> Band | Sequences | Opaque:
    """The meaning of a mask that differs from query to query.

    Reads from the mask's device which rows change, then whether the mask is the guessed band, if
    there is a guess. If it is no band: one row of each run; whether the guessed causal runs are
    causal; and, if some are not, one row of each run again.

    Args:
        seen: (B or 1, Sq, Sk) bool, True where the key is seen.
        counts: `count_keys(seen)`.
    """
    ends = seen[0, :: seen.shape[1] - 1]
    changes, counts, ends = _to_host(_changes(seen), counts, ends)
    return _band(seen, counts, ends) or _sequences(seen, changes, counts)


def _to_host(*tensors: Tensor) -> list[Tensor]:
    """Host copies of `tensors`, as int64; one synchronisation for all of them."""
    joined = torch.cat([x.flatten() for x in tensors]).cpu()
    parts = torch.split(joined, [x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors)]


def blocks(mask: Tensor, overlap: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Splits a (B, Sq, Sk) mask into blocks of rows: (first row, block) for each.

    A block also has the first `overlap` rows of the next block.
    """
    samples, q_len, k_len = mask.shape
    size = GPU_BLOCK if mask.is_cuda else CPU_BLOCK
    step = max(1, size // (samples * k_len))
    for start in range(0, q_len, step):
        yield start, mask[:, start : start + step + overlap]


def _words(seen: Tensor) -> Tensor:
    """`seen` as int64 words of eight keys, padded with 0; a view if every row is whole words."""
    behind = -seen.shape[-1] % 8
    steps = (*seen.stride()[:-1], seen.storage_offset())
    if not behind and seen.stride(-1) == 1 and not any(step % 8 for step in steps):
        return seen.view(torch.int64)
    return F.pad(seen, (0, behind)).contiguous().view(torch.int64)


def _changes(seen: Tensor) -> Tensor:
    """Which rows differ from the row above, bool (B, Sq); True for the first row."""
    words = (_words(block) for _, block in blocks(seen, overlap=1))
    changes = [(block[:, 1:] != block[:, :-1]).any(-1) for block in words]
    return F.pad(torch.cat(changes, dim=-1)[:, : seen.shape[1] - 1], (1, 0), value=True)


def _band(seen: Tensor, counts: Tensor, ends: Tensor) -> Band | None:
    """The band guessed from `ends`, the first and the last row, if the whole mask is that band."""
    q_len, k_len = seen.shape[1:]
    top, bottom = (row.nonzero().flatten().tolist() for row in ends)
    if not (top and bottom):
        return None
    right = -1 if top[-1] == k_len - 1 else top[-1] - (k_len - q_len)
    left = -1 if bottom[0] == 0 else k_len - 1 - bottom[0]
    level = torch.arange(k_len - q_len, k_len, device="cpu")
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
    """Rows `start` to `end` (exclusive) of a sample.

    All rows are equal; or, if `causal`, each row sees one key more than the row above.
    """

    sample: int
    start: int
    end: int
    keys: int
    """The number of keys that the last row sees."""
    causal: bool = False

    def apart(self) -> list[_Run]:
        """The rows of a causal run, as runs of one row each."""
        counts = range(self.keys - (self.end - self.start) + 1, self.keys + 1)
        rows = range(self.start, self.end)
        return [_Run(self.sample, row, row + 1, keys) for row, keys in zip(rows, counts)]


_Groups = dict[tuple[int, bytes, int], list[_Run]]
"""The runs of each group, by (sample, last row as bytes, start if causal else -1). Runs of equal
rows that see the same keys share a group; each causal run is a group of its own."""


def _sequences(seen: Tensor, changes: Tensor, counts: Tensor) -> Sequences | Opaque:
    runs = _runs(changes, counts, _most_keys(seen))
    if isinstance(runs, Opaque):
        return runs
    groups = _groups(seen, runs)
    # Groups that are not guesses first: a scattered mask is refused before the guesses are checked.
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
            torch.cat([torch.arange(run.start, run.end, device="cpu") for run in same]),
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
    """The limit on the sum of all groups' keys, see COPIES."""
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
    """The runs of all samples, from `changes` (see `_changes`) and `counts`, on the host.

    Equal consecutive rows form a run. Distinct consecutive rows whose counts rise by one also form
    a run, which is guessed to be causal; `_guessed_wrongly` checks the guess. Rows without valid
    keys are in no run, so that their q reaches no kernel.
    """
    changed = changes.bool()
    alone = changed & F.pad(changed[:, 1:], (0, 1), value=True)
    rises = (counts[:, 1:] == counts[:, :-1] + 1) & (counts[:, :-1] > 0)
    grows = F.pad(alone[:, 1:] & alone[:, :-1] & rises, (1, 0), value=False)
    starts = changed & ~grows
    found = int((starts & (counts > 0)).sum())
    if found > MOST_GROUPS:
        return _too_many_groups(found)
    # Runs of equal rows with different counts are different groups. So the distinct counts of all
    # samples add up to a lower bound of the keys to copy: most scattered masks are refused here.
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
    """The runs among `causal`, pairs of (last row, run), that are not causal.

    In a causal run, a row that sees n keys sees the first n keys of the last row. The counts are
    known, so it is enough that no row sees any other key. One synchronisation for all runs.
    """
    if not causal:
        return set()
    k_len = seen.shape[-1]
    places = torch.full((len(causal), k_len), k_len, dtype=torch.int32, device="cpu")
    for place, (last_row, run) in zip(places, causal):
        keys = torch.arange(run.keys, dtype=torch.int32, device="cpu")
        place[_positions(last_row)] = keys
    places = places.to(seen.device)
    wrong = [_sees_too_early(seen[run.sample], run, p) for p, (_, run) in zip(places, causal)]
    answers: list[bool] = torch.stack(wrong).tolist()
    return {run for answer, (_, run) in zip(answers, causal) if answer}


def _sees_too_early(seen: Tensor, run: _Run, place: Tensor) -> Tensor:
    """Whether a row of n keys sees any key that is not among the first n keys of the last row.

    `place` is int32 (Sk,): each key's position among the last row's keys, Sk for all other keys.
    """
    first = run.keys - (run.end - run.start) + 1
    counts = torch.arange(first, run.keys + 1, dtype=torch.int32, device=seen.device)[:, None]
    rows = seen[None, run.start : run.end]
    early = [
        _words(block & (place >= counts[row : row + block.shape[1]])).any()
        for row, block in blocks(rows)
    ]
    return torch.stack(early).any()
