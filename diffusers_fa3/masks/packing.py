"""The plan of an attention call; from padded tensors to packed ones and back, by that plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusers_fa3.options import DENSE, Lengths

Route = Literal["dense", "band", "seqused", "packed", "static"]


@dataclass(frozen=True, slots=True, eq=False)
class PackingPlan:
    """How a call of one shape and mask reaches a variable-length kernel.

    Routes:
        dense: the mask says nothing; tensors go to the kernel as they are.
        band: the mask is causal or a sliding window, and so is the call; tensors go as they are.
        seqused: the valid keys of each sample are its first; tensors go as they are, up to the last
            key that is valid in any sample, with the number of valid keys where samples differ.
        packed: valid keys are gathered, samples end to end; queries too where whole rows are
            masked, and then the other rows of the output are 0. Where queries of one sample see
            different keys, each group of them is a sequence, as a sample is otherwise.
        static: nothing was read from the mask, as in a CUDA graph; as many keys are copied as there
            were, the valid ones of each sample to the front, with their number, and one of them
            again in the place of the others.
    """

    route: Route
    batch: int
    q_len: int
    k_len: int
    lengths: Lengths = DENSE
    """What the kernel is told of the samples: `cu_seqlens` and `max_seqlen` on route packed, where
    a group of queries that see alike is a sample; `seqused_k` on routes seqused and static."""
    rows_v: Tensor | None = None
    """int64 (B * S): for each key that goes to the kernel, where in B * Sk its value is taken from,
    if that of padding must not be seen: there, from the sample's first key, or, where it has none,
    from that of a sample that has. Route seqused."""
    indices_q: Tensor | None = None
    """int64 (Tq,): positions in B * Sq of the queries that are kept; None: all of them. Route
    packed."""
    indices_k: Tensor | None = None
    """int64 (Tk,): positions in B * Sk of the valid keys; (B * Sk,), of all keys, on static.

    None: all of them, in order.
    """
    causal: bool = False
    """What the kernel is to be told, aligned at the last query and key. Routes band and packed."""
    window: tuple[int, int] = (-1, -1)
    first_key: int = 0
    """Keys before it are too far from every query, and left out. Route band."""
    end_key: int | None = None
    """Keys from it on are padding in every sample, and left out. Route seqused."""
    also: PackingPlan | None = None
    """A second launch, for queries that see keys causally where others do not, or the other way
    round. Each launch gives rows of 0 for the queries of the other: the output is their sum."""

    @property
    def cu_seqlens_q(self) -> Tensor | None:
        """Of `lengths`, as the four below: int32 (B + 1), where samples begin and end."""
        return self.lengths.cu_seqlens_q

    @property
    def cu_seqlens_k(self) -> Tensor | None:
        """Likewise, of keys."""
        return self.lengths.cu_seqlens_k

    @property
    def max_seqlen_q(self) -> int:
        """The longest sample's queries, 0 where there are no `cu_seqlens`."""
        return self.lengths.max_seqlen_q or 0

    @property
    def max_seqlen_k(self) -> int:
        """Likewise, of keys."""
        return self.lengths.max_seqlen_k or 0

    @property
    def seqused_k(self) -> Tensor | None:
        """int32 (B,): valid keys of each sample."""
        return self.lengths.seqused_k

    def pack(
        self, q: Tensor, k: Tensor, v: Tensor, reads_padding: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, H, D) tensors as the kernel takes them: (T, H, D) on route packed.

        `reads_padding`: the kernel weighs values that `seqused_k` leaves out by 0, instead of
        leaving them out. Then `v` has a valid one there, since NaN and inf survive that.
        """
        if self.route == "static":
            return q, _take(k, self.indices_k).view_as(k), _take(v, self.indices_k).view_as(v)
        if self.route != "packed":
            whole_v = v
            if self.first_key or self.end_key is not None:
                k, v = (x[:, self.first_key : self.end_key] for x in (k, v))
            if reads_padding and self.rows_v is not None:
                v = _take(whole_v, self.rows_v).view_as(v)
            return q, k, v
        return _take(q, self.indices_q), _take(k, self.indices_k), _take(v, self.indices_k)

    def buffer(self, out: Tensor | None) -> Tensor | None:
        """The part of the caller's (B, Sq, H, D) `out` that a kernel can fill by itself, if any."""
        if out is None or self.route != "packed":
            return out
        rows_in_order = out.stride(0) == self.q_len * out.stride(1)
        return out.flatten(0, 1) if rows_in_order and self.indices_q is None else None

    def unpack(self, result: Tensor, out: Tensor | None = None) -> Tensor:
        """The kernel's result, (Tq, H, D) on route packed, as (B, Sq, H, D).

        Into `out` where one is given: what `buffer` offered to the kernel is there already.
        """
        if self.route != "packed":
            return result
        if out is None:
            return self._per_sample(self._padded(result, 0.0))
        if self.indices_q is not None:
            out.zero_()
            out[self.indices_q // self.q_len, self.indices_q % self.q_len] = result
        elif self.buffer(out) is None:
            out.copy_(self._per_sample(result))
        return out

    def unpack_lse(self, lse: Tensor) -> Tensor:
        """The kernel's LSE, (H, Tq) on route packed, as (B, H, Sq); -inf in rows without keys."""
        if self.route != "packed":
            return lse
        rows = self._padded(lse.transpose(0, 1), -torch.inf)
        return self._per_sample(rows).transpose(1, 2)

    def _per_sample(self, rows: Tensor) -> Tensor:
        return rows.view(self.batch, self.q_len, *rows.shape[1:])

    def _padded(self, rows: Tensor, fill: float) -> Tensor:
        if self.indices_q is None:
            return rows
        padded = rows.new_full((self.batch * self.q_len, *rows.shape[1:]), fill)
        return padded.index_copy_(0, self.indices_q, rows)


def _take(x: Tensor, indices: Tensor | None) -> Tensor:
    """Rows of (B, S, H, D) at `indices` into B * S, copied once whatever the strides."""
    if indices is None:
        return x.flatten(0, 1)
    if x.is_floating_point() and x.dtype.itemsize == 1:  # not every torch indexes float8 on a GPU
        return _take(x.view(torch.uint8), indices).view(x.dtype)
    length = x.shape[1]
    if x.stride(0) == length * x.stride(1):
        return x.flatten(0, 1).index_select(0, indices)
    return x[indices // length, indices % length]
