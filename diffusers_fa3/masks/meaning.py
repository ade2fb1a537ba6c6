"""What a mask can mean to a variable-length kernel: one record for each kind of mask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AllValid:
    """Every query sees every key: the mask has no effect."""


@dataclass(frozen=True, slots=True, eq=False)
class Valid:
    """Every valid query sees every valid key; other queries see no key.

    `keys` is (B or 1, Sk) bool. `queries` is (B or 1, Sq) bool, or None if every query is valid.
    `k_lens` and `q_lens` count the valid keys and queries in each row; they are on the host.
    """

    keys: Tensor
    k_lens: tuple[int, ...]
    k_leading: bool
    """In each sample, all valid keys come before all padding (right padding or no padding)."""
    queries: Tensor | None = None
    q_lens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Band:
    """A sliding window, aligned bottom-right: the last query is level with the last key.

    Query i sees the keys from i + Sk - Sq - left to i + Sk - Sq + right. -1 means no limit on that
    side, as in FlashAttention's `window_size`. (-1, 0) is causal.
    """

    left: int
    right: int


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """A group of queries of one sample, and the keys that the group sees.

    `queries` and `keys` are int64 positions in the sample, on the host.
    """

    sample: int
    queries: Tensor
    keys: Tensor
    causal: bool
    """False: every query sees all `keys`. True: the last query does, the query before it all but
    the last key, and so on."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """The groups of a mask that depends on the query. Queries in no group see no key.

    `samples` is 1 if one mask serves the whole batch, else B.
    """

    sequences: tuple[Sequence, ...]
    samples: int


@dataclass(frozen=True, slots=True)
class Opaque:
    """A mask that packing cannot express, with the reason."""

    reason: str


Meaning = AllValid | Valid | Band | Sequences | Opaque
