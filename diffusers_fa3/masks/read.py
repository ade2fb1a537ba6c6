"""What a mask means: which keys each query of an attention call sees.

Axis letters, here and everywhere: B batch, H heads, Sq and Sk lengths of queries and keys.

A mask is judged by its content, not by its shape: a (B, 1, Sq, Sk) mask often says only that the
last keys are padding, and a (B, H, 1, Sk) mask may differ between heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusers_fa3.errors import MaskError
from diffusers_fa3.masks.meaning import AllValid, Meaning, Opaque, Valid
from diffusers_fa3.masks.outer import is_in_factors
from diffusers_fa3.masks.rows import blocks, count_keys, read_rows

MASKED_FROM = -1e4
"""Additive values at or below this one mask a key. diffusers writes -1e4 or less for padding.

exp(-1e4) is 0 in every float dtype. So in a row with at least one valid key, the additive mask
gives the same softmax as a bool mask, unless logits differ by thousands. In a row without valid
keys it does not (see `_empty_rows_are_zero`).
"""

Axes2D = Literal["bk", "qk"]
"""How a 2-D mask is read: (B, Sk) as diffusers' dispatcher does, or (Sq, Sk) as SDPA does."""


def read_mask(
    mask: Tensor, *, batch: int, heads: int, q_len: int, k_len: int, axes_2d: Axes2D = "bk"
) -> Meaning:
    """The meaning of `mask`. Costs one read from its device.

    If the valid keys differ between queries that have any, it costs a few reads more: see
    `rows.read_rows`.

    Args:
        mask: bool (True: the key is seen), int (0 or 1, as tokenizers write it) or additive float
            (every value 0 or <= -1e4). Shape (Sk), (B, Sk) or (Sq, Sk) (see `axes_2d`),
            (H, Sq, Sk), or (B, H, Sq, Sk); each axis may be 1 or expanded.
        batch: B.
        heads: H.
        q_len: Sq.
        k_len: Sk.
        axes_2d: "bk" reads a 2-D mask as (B, Sk), "qk" as (Sq, Sk).

    Raises:
        MaskError: the mask does not broadcast to (B, H, Sq, Sk), or an int mask has values other
            than 0 and 1.
    """
    if is_in_factors(mask) and mask.shape[2:] == (q_len, k_len):
        if mask.is_floating_point():
            return _bias(mask)
        queries, keys = mask.factors
        return _read_outer(queries[:, 0, :, 0], keys[:, 0, 0])
    if mask.requires_grad:
        return Opaque("mask that gradients are asked for")
    mask = as_4d(mask, (batch, heads, q_len, k_len), axes_2d)
    if mask.numel() == 0:
        return AllValid() if k_len == 0 or 0 in (batch, heads, q_len) else Opaque("empty mask")

    seen = _seen(mask)
    one_head = seen[:, 0]
    keys = one_head.view(torch.uint8).any(-2).view(torch.bool)
    counts = count_keys(seen.flatten(0, 1)).view(seen.shape[:3])
    k_seen = counts[:, 0]
    queries, k_counts = k_seen > 0, keys.sum(-1)
    facts = _Facts.read(
        values=_values_are_those_of_a_mask(mask, counts),
        empty_rows_are_zero=_empty_rows_are_zero(mask, counts),
        heads_agree=(seen == one_head[:, None]).all() if seen.shape[1] > 1 else None,
        # A row sees no key outside `keys`, so a row that sees as many keys sees all of `keys`.
        factors=((k_seen == 0) | (k_seen == k_counts[:, None])).all(),
        k_leading=(keys[:, 1:] <= keys[:, :-1]).all(),
        k_counts=k_counts,
        q_counts=queries.sum(-1),
    )

    if not facts.values:
        if not mask.is_floating_point():
            raise MaskError(f"{_dtype(mask)} mask with values other than 0 and 1; pass a bool mask")
        return _bias(mask)
    if not facts.empty_rows_are_zero:
        return Opaque(
            "additive mask with a row that has no valid key and finite values: "
            "the default averages over its padding"
        )
    if not facts.heads_agree:
        return Opaque("mask differs between heads")
    if not facts.factors:
        return read_rows(one_head, k_seen)

    return _valid(None if one_head.shape[1] == 1 else queries, keys, facts)


def _read_outer(queries: Tensor, keys: Tensor) -> AllValid | Valid:
    """The meaning of the mask `queries & keys`: (B or 1, Sq) and (B or 1, Sk) bool."""
    facts = _Facts.read(
        k_leading=(keys[:, 1:] <= keys[:, :-1]).all(),
        k_counts=keys.sum(-1),
        q_counts=queries.sum(-1),
    )
    return _valid(queries, keys, facts)


def _valid(queries: Tensor | None, keys: Tensor, facts: _Facts) -> AllValid | Valid:
    if queries is not None and all(n == queries.shape[1] for n in facts.q_counts):
        queries = None
    if queries is None and all(n == keys.shape[1] for n in facts.k_counts):
        return AllValid()
    q_lens = () if queries is None else facts.q_counts
    return Valid(keys, facts.k_counts, facts.k_leading, queries, q_lens)


def keys_by_structure(
    mask: Tensor, *, batch: int, heads: int, q_len: int, k_len: int, axes_2d: Axes2D = "bk"
) -> Tensor | Opaque:
    """The valid keys of `mask`, (B or 1, Sk) bool, computed on the device without a read.

    The mask must be bool or int, with one row per sample: its H and Sq axes are 1 or expanded. Any
    other mask is `Opaque`. Arguments and errors are those of `read_mask`, except that the values of
    an int mask are not checked: any value but 0 is a valid key.
    """
    mask = as_4d(mask, (batch, heads, q_len, k_len), axes_2d)
    if mask.is_floating_point():
        return Opaque("additive mask, of which only its values tell whether it is a bias")
    if mask.shape[1] > 1 or mask.shape[2] > 1:
        return Opaque("mask of which only its values tell whether queries or heads differ")
    return (mask[:, 0] != 0).any(-2)  # `any` over one row, or over no row if Sq is 0


@dataclass(frozen=True, slots=True)
class _Facts:
    """Facts about a mask's content, on the host after one transfer."""

    k_counts: tuple[int, ...]
    q_counts: tuple[int, ...]
    k_leading: bool
    values: bool = True
    empty_rows_are_zero: bool = True
    heads_agree: bool = True
    factors: bool = True

    @classmethod
    def read(cls, *, k_counts: Tensor, q_counts: Tensor, **flags: Tensor | None) -> _Facts:
        asked = {name: flag for name, flag in flags.items() if flag is not None}
        read: list[int] = torch.cat(
            [torch.stack(list(asked.values())).long(), k_counts, q_counts]
        ).tolist()
        answers = {name: bool(x) for name, x in zip(asked, read)}
        counts = read[len(asked) :]
        rows = len(k_counts)
        return cls(tuple(counts[:rows]), tuple(counts[rows:]), **answers)


def as_4d(mask: Tensor, sizes: tuple[int, int, int, int], axes_2d: Axes2D) -> Tensor:
    """A view of `mask` with axes (B, H, Sq, Sk), in which expanded axes but Sk have size 1.

    Raises:
        MaskError: the mask does not broadcast to these sizes.
    """
    if mask.ndim == 2 and axes_2d == "bk":
        view = mask[:, None, None, :]
    elif 1 <= mask.ndim <= 4:
        view = mask[(None,) * (4 - mask.ndim)]
    else:
        view = None
    if view is None or any(got not in (1, want) for got, want in zip(view.shape, sizes)):
        batch, _, q_len, k_len = sizes
        raise MaskError(
            f"mask of shape {tuple(mask.shape)} does not broadcast to (B, H, Sq, Sk) = {sizes}; "
            f"pass (B, Sk) = {(batch, k_len)}, (B, 1, 1, Sk) = {(batch, 1, 1, k_len)} "
            f"or (B, 1, Sq, Sk) = {(batch, 1, q_len, k_len)}"
        )
    view = view.expand(-1, -1, -1, sizes[3])
    for axis in range(3):
        if view.stride(axis) == 0 and view.shape[axis] > 1:
            view = view.narrow(axis, 0, 1)
    return view


def _seen(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    # logical_not is True at 0; on a CPU it takes a third of the time of a comparison.
    return mask.logical_not() if mask.is_floating_point() else mask == 1


def _values_are_those_of_a_mask(mask: Tensor, counts: Tensor) -> Tensor | None:
    if mask.dtype == torch.bool:
        return None
    masked = [count_keys(_masked(block)).sum() for _, block in blocks(mask.flatten(0, 1))]
    return counts.sum() + torch.stack(masked).sum() == mask.numel()


def _masked(mask: Tensor) -> Tensor:
    return mask <= MASKED_FROM if mask.is_floating_point() else mask == 0


def _empty_rows_are_zero(mask: Tensor, counts: Tensor) -> Tensor | None:
    """Whether the default, too, gives 0 in rows without a valid key: it does if all are -inf."""
    if not mask.is_floating_point():
        return None
    return ((counts > 0) | (mask.amax(-1) == -torch.inf)).all()


def _bias(mask: Tensor) -> Opaque:
    return Opaque(f"{_dtype(mask)} mask with values that are a bias, not a mask")


def _dtype(mask: Tensor) -> str:
    return str(mask.dtype).removeprefix("torch.")
