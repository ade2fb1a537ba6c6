"""Watch or spoil the attention calls of a default forward.

Every default processor of the zoo ends in `torch.nn.functional.scaled_dot_product_attention`, by
itself or through diffusers' dispatcher, so this is the one place to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn import functional

Sdpa = Callable[..., torch.Tensor]
SDPA: Sdpa = functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Call:
    """One attention call: (B, H, S, D) shapes and what its mask says.

    Attributes:
        mask: dtype and shape, or None.
        hides: some key is hidden from some query.
        leading: in every row the visible keys are the first ones.
        per_query: the mask differs between query rows.
        biased: the mask weighs keys, rather than to hide or to show them.
        content: the same for masks of the same values, in calls of the same lengths.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    mask: str | None
    hides: bool
    leading: bool
    per_query: bool
    biased: bool
    content: int


@dataclass
class Log:
    """The attention calls seen so far."""

    calls: list[Call] = field(default_factory=list)

    @property
    def hides(self) -> bool:
        """Whether some call hides keys."""
        return any(call.hides for call in self.calls)

    @property
    def biased(self) -> bool:
        """Whether some call has a bias."""
        return any(call.biased for call in self.calls)

    @property
    def misplaced(self) -> bool:
        """Whether taking the first n keys instead of the n visible ones would be wrong."""
        return any(not call.leading for call in self.calls)


def visible(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool = False
) -> torch.Tensor:
    """Return the (B, H, Sq, Sk) bool mask that a bool, additive or absent mask means."""
    shape = (*q.shape[:3], k.shape[2])
    if mask is None:
        everything = torch.ones(shape, dtype=torch.bool)
        return everything.tril() if is_causal else everything
    return (mask if mask.dtype == torch.bool else mask > -1e4).expand(shape)


def describe(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> Call:
    """Return what the call looks like."""
    seen = visible(q, k, mask)
    return Call(
        q=tuple(q.shape),
        k=tuple(k.shape),
        mask=None if mask is None else f"{mask.dtype} {tuple(mask.shape)}",
        hides=not bool(seen.all()),
        leading=not bool((~seen[..., :-1] & seen[..., 1:]).any()),
        per_query=bool((seen != seen[:, :, :1]).any()),
        biased=bool(
            mask is not None and mask.is_floating_point() and ((mask != 0) & (mask > -1e4)).any()
        ),
        content=hash((*q.shape[2:], *k.shape[2:], None if mask is None else str(mask.tolist()))),
    )


@contextmanager
def replaced(sdpa: Sdpa) -> Iterator[None]:
    """Run the block with `sdpa` in place of torch's function."""
    functional.scaled_dot_product_attention = sdpa
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = SDPA


@contextmanager
def watched() -> Iterator[Log]:
    """Record the attention calls of the block."""
    log = Log()

    def record(query, key, value, attn_mask=None, *args, **kwargs):
        log.calls.append(describe(query, key, attn_mask))
        return SDPA(query, key, value, attn_mask, *args, **kwargs)

    with replaced(record):
        yield log


def without_mask(query, key, value, attn_mask=None, *args, **kwargs):
    """Wrong: the mask is dropped."""
    return SDPA(query, key, value, None, *args, **kwargs)


def first_keys(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    """Wrong: the first n keys in place of the n visible ones, per row."""
    count = visible(query, key, attn_mask, is_causal).sum(-1, keepdim=True)
    prefix = torch.arange(key.shape[2]) < count
    return SDPA(query, key, value, prefix, dropout_p, **kwargs)


def key_lost_in(index: int) -> Sdpa:
    """Wrong in one call only: call number `index` misses the last key that it should see."""
    remaining = iter(range(index, -1, -1))

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        if next(remaining, None) != 0:
            return SDPA(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        seen = visible(query, key, attn_mask, is_causal)
        lost = seen[0].any(dim=(0, 1)).nonzero().max()
        kept = seen & (torch.arange(key.shape[2]) != lost)
        return SDPA(query, key, value, kept, dropout_p, **kwargs)

    return sdpa
