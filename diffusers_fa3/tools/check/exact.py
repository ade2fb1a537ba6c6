"""Attention in float64, in blocks that need a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BYTES = 256 * 2**20
"""What the logits of one block may take, with the copies that are made of them."""
COPIES = 4
"""Logits, their mask, the weights, and what softmax needs."""


class AttentionCall(NamedTuple):
    """What an attention call computes, in the order of `default_attention`'s arguments."""

    q: Tensor
    """(B, Sq, H, D)"""
    k: Tensor
    """(B, Sk, Hk, D); H is a multiple of Hk."""
    v: Tensor
    """(B, Sk, Hk, Dv)"""
    mask: Tensor | None = None
    """bool or additive float, 4-D, which broadcasts to (B, H, Sq, Sk)."""
    scale: float | None = None
    """Factor of the logits; None is D ** -0.5."""
    causal: bool = False
    """Query i sees keys up to i."""


class Block(NamedTuple):
    """The exact output of some queries and heads of one sample."""

    sample: int
    rows: slice
    heads: slice
    out: Tensor
    """(rows, heads, Dv), float64."""

    def of(self, tensor: Tensor) -> Tensor:
        """The same part of a (B, Sq, H, Dv) tensor, in float64."""
        return tensor[self.sample, self.rows, self.heads].double()


def exact_blocks(call: AttentionCall, limit: int = BYTES) -> Iterator[Block]:
    """What `scaled_dot_product_attention` computes, in float64, block by block.

    A row without any key is 0. Values at keys that no query of a block sees do not matter. The
    logits of a block take up to `limit` bytes.
    """
    q, k, v, mask, scale, causal = call
    batch, q_len, heads, head_dim = q.shape
    k_len, group = k.shape[1], heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    numbers = limit // (8 * COPIES)
    many_heads = max(1, min(heads, numbers // max(1, q_len * k_len)))
    many_rows = max(1, min(q_len, numbers // max(1, many_heads * k_len)))
    if mask is not None:
        mask = mask.expand(batch, heads, q_len, k_len)  # a view
    for sample in range(batch):
        for of in _slices(heads, many_heads):
            shared = torch.arange(of.start, of.stop, device=k.device) // group
            keys, values = (x[sample].index_select(1, shared).double() for x in (k, v))
            for rows in _slices(q_len, many_rows):
                logits = torch.einsum("qhd,khd->hqk", q[sample, rows, of].double(), keys) * scale
                if mask is not None:
                    logits = _masked(logits, mask[sample, of, rows])
                if causal:
                    at = torch.arange(rows.start, rows.stop, device=q.device)
                    later = torch.arange(k_len, device=q.device) > at[:, None]
                    logits = logits.masked_fill(later, -torch.inf)
                yield Block(sample, rows, of, _attend(logits, values))


def _slices(length: int, many: int) -> list[slice]:
    return [slice(i, min(i + many, length)) for i in range(0, length, many)]


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    hidden = mask == -torch.inf  # also where the logit is NaN
    return (logits + mask.double()).masked_fill(hidden, -torch.inf)


def _attend(logits: Tensor, values: Tensor) -> Tensor:
    """(heads, rows, Sk) and (Sk, heads, Dv) -> (rows, heads, Dv)."""
    hidden = logits == -torch.inf
    unseen = hidden.all(1).transpose(0, 1)[..., None]  # keys
    empty = hidden.all(2, keepdim=True)  # rows
    weights = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("hqk,khd->qhd", weights, values.masked_fill(unseen, 0.0))
