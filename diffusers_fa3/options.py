"""What a kernel is told besides q, k and v: two records, which every kernel's adapter reads.

Tuples, since they are made in every call, and tuples are made fast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Lengths(NamedTuple):
    """Where the samples of packed tensors begin and end, and which of their keys are valid.

    All None: dense tensors, every key of which is valid.
    """

    cu_seqlens_q: Tensor | None = None
    """int32 (B + 1): where each sample's queries begin and end in (Tq, H, D)."""
    cu_seqlens_k: Tensor | None = None
    """int32 (B + 1), likewise for keys."""
    max_seqlen_q: int | None = None
    """The longest sample's queries, or more."""
    max_seqlen_k: int | None = None
    """Likewise for keys."""
    seqused_k: Tensor | None = None
    """int32 (B,): how many keys of each sample are valid, from its first. Also of dense tensors."""


DENSE = Lengths()


class Options(NamedTuple):
    """How the scores of queries and keys are made.

    A kernel's adapter takes the options that it knows, and refuses those that are `beyond` them.
    """

    softmax_scale: float
    """Factor of the logits; a number, also where it is the default."""
    causal: bool = False
    """The last query sees all keys, the query before it all but one, and so on."""
    window: tuple[int, int] = (-1, -1)
    """Keys seen to the left and right of a query's own, -1 for all; aligned as `causal` is."""
    softcap: float = 0.0
    """Bound of the logits by tanh; 0 for none."""
    q_descale: Tensor | None = None
    """fp32 (B, Hk), for float8."""
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None

    def beyond(self, *known: str) -> dict[str, Any]:
        """The options that are asked for, but for the scale and those of these names."""
        if self[1:] == _NOTHING:  # which most calls ask for, and is told at once
            return {}
        return {
            name: value
            for name, value in zip(self._fields[1:], self[1:])
            if name not in known and not is_default(value)
        }


_NOTHING = Options(1.0)[1:]


def is_default(value: Any) -> bool:
    """Whether an option's value asks for nothing."""
    if value is None or value is False:
        return True
    return not isinstance(value, Tensor) and (value == 0 or value == (-1, -1))
