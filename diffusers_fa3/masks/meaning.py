"""What a mask can mean to a variable-length kernel: one record for each way of saying it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AllValid:
    """Every query sees every key: the mask says nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Valid:
    """Valid queries see valid keys; rows of other queries are empty.

    `keys` is (B or 1, Sk) bool. `queries` is (B or 1, Sq) bool, or None where every query counts.
    The lengths, one for each row of `keys` and `queries`, are on the host already.
    """

    keys: Tensor
    k_lens: tuple[int, ...]
    k_leading: bool
    """The valid keys of each sample are its first: right padding, or none."""
    queries: Tensor | None = None
    q_lens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Band:
    """Query i sees keys from i - left to i + right, the last query being level with the last key.

    -1 is no limit, as FlashAttention's `window_size` has it. (-1, 0) is causal.
    """

    left: int
    right: int


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """Queries of one sample that see the same keys: int64 positions in it, on the host."""

    sample: int
    queries: Tensor
    keys: Tensor
    causal: bool
    """The last query sees all keys, and each one before it one key less, from the end."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Queries fall into groups that see alike; rows of queries in no group are empty.

    `samples` is 1 where one mask serves the whole batch, else B.
    """

    sequences: tuple[Sequence, ...]
    samples: int


@dataclass(frozen=True, slots=True)
class Opaque:
    """A mask that packing cannot express, and why."""

    reason: str


Meaning = AllValid | Valid | Band | Sequences | Opaque
