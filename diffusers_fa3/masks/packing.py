"""The plan of an attention call: it packs padded tensors for the kernel and unpacks the result."""

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
        dense: the mask has no effect. The kernel gets q, k and v as they are.
        band: the mask is causal or a sliding window, which the kernel is told. No copy.
        seqused: right padding. The kernel gets views of k and v, cut after the last key that is
            valid in any sample, and `seqused_k` unless every sample has that many valid keys.
        packed: the valid keys of all samples are gathered, one sample after the other. Queries are
            gathered too where whole rows are masked; their rows of the output are 0. If the
            queries of a sample see different keys, each group of queries is one sequence.
        static: for CUDA graphs and torch.compile. The plan is computed on the device, without
            reading the mask. All B * Sk keys are copied: each sample's valid keys first, then one
            valid key repeated in place of the padding. `seqused_k` counts the valid keys.
    """

    route: Route
    batch: int
    q_len: int
    k_len: int
    lengths: Lengths = DENSE
    """The kernel's length arguments: `cu_seqlens` and `max_seqlen` on route packed, where B counts
    sequences (see Routes); `seqused_k` on routes seqused and static."""
    rows_v: Tensor | None = None
    """int64 (B * E,), E being `end_key` or Sk: for each row of v that the kernel gets, the position
    in B * Sk to copy it from, for kernels that read padding. A valid key keeps its own value.
    Padding gets the value of its sample's first key; in a sample without valid keys, the value of
    the first key of the sample with the most. Route seqused, where `seqused_k` is set."""
    indices_q: Tensor | None = None
    """int64 (Tq,): positions in B * Sq of the queries to gather. Route packed.

    None: all queries, in order.
    """
    indices_k: Tensor | None = None
    """int64 positions in B * Sk of the keys to gather: (Tk,) on route packed, (B * Sk,) on static.

    None: all keys, in order.
    """
    causal: bool = False
    """The kernel's `causal`, aligned bottom-right. Routes band and packed."""
    window: tuple[int, int] = (-1, -1)
    """The kernel's `window_size`, aligned bottom-right; -1 means no limit. Route band."""
    first_key: int = 0
    """Keys before this position are outside every query's window and are cut off. Route band."""
    end_key: int | None = None
    """Keys from this position on are padding in every sample and are cut off. Route seqused.

    None: no key is cut off.
    """
    also: PackingPlan | None = None
    """A second kernel launch, if some groups of queries are causal and others are not: `self`
    serves the others, `also` the causal groups. Each launch gives 0 in the rows of the other, so
    the output is the sum of both."""

    @property
    def cu_seqlens_q(self) -> Tensor | None:
        """From `lengths`: int32 (B + 1,), where each sequence's queries begin and end; or None."""
        return self.lengths.cu_seqlens_q

    @property
    def cu_seqlens_k(self) -> Tensor | None:
        """From `lengths`: int32 (B + 1,), where each sequence's keys begin and end; or None."""
        return self.lengths.cu_seqlens_k

    @property
    def max_seqlen_q(self) -> int:
        """From `lengths`: the most queries of any sequence; 0 if there are no `cu_seqlens`."""
        return self.lengths.max_seqlen_q or 0

    @property
    def max_seqlen_k(self) -> int:
        """From `lengths`: the most keys of any sequence; 0 if there are no `cu_seqlens`."""
        return self.lengths.max_seqlen_k or 0

    @property
    def seqused_k(self) -> Tensor | None:
        """From `lengths`: int32 (B,), the number of valid keys of each sample; or None."""
        return self.lengths.seqused_k

    def pack(
        self, q: Tensor, k: Tensor, v: Tensor, reads_padding: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel's q, k and v for (B, S, H, D) tensors: (T, H, D) on route packed.

        `reads_padding`: the kernel multiplies values beyond `seqused_k` by 0 instead of skipping
        them. NaN and inf would survive that, so `v` then gets valid values there (see `rows_v`).
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
        """A view of the caller's (B, Sq, H, D) `out` that the kernel can write into, or None."""
        if out is None or self.route != "packed":
            return out
        rows_in_order = self.batch == 1 or out.stride(0) == self.q_len * out.stride(1)
        return out.flatten(0, 1) if rows_in_order and self.indices_q is None else None

    def unpack(self, result: Tensor, out: Tensor | None = None) -> Tensor:
        """The kernel's result, (Tq, H, D) on route packed, as (B, Sq, H, D).

        If `out` is given, the result is written into `out`, unless the kernel already wrote it
        there through `buffer(out)`.
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
    """Rows of (B, S, H, D) `x` at `indices`, positions in B * S; one copy, whatever the strides."""
    if indices is None:
        return x.flatten(0, 1)
    if x.is_floating_point() and x.dtype.itemsize == 1:  # not every torch indexes float8 on a GPU
        return _take(x.view(torch.uint8), indices).view(x.dtype)
    length = x.shape[1]
    # Of one sample, the stride of the batch says nothing.
    if x.shape[0] == 1 or x.stride(0) == length * x.stride(1):
        return x.flatten(0, 1).index_select(0, indices)
    return x[indices // length, indices % length]
