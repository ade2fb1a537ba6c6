"""Observed layers of a model that is split over ranks.

In a call over split tokens, ours is what this package gave for the queries of this rank. The
default is PyTorch's attention of the same queries over the keys and values of all ranks. These are
gathered here, by torch.distributed itself, since the package's own exchange is under test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from diffusers_fa3.attention import default_attention
from diffusers_fa3.layers import LayerRecord
from diffusers_fa3.masks import Axes2D, is_in_factors
from diffusers_fa3.parallel import Split
from diffusers_fa3.tools.check.exact import AttentionCall
from diffusers_fa3.tools.check.gather import of_all_ranks
from diffusers_fa3.tools.check.observed import ObservedFrame, Observer, call_of, laid_out


@dataclass
class RankObserver(Observer):
    """What the observed layers did on this rank."""

    errors: list[str] = field(default_factory=list)
    """Those of kernels, from `errors_of_kernels`; taken out call by call."""

    def frame(
        self, record: LayerRecord, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ObservedFrame:
        """A frame that knows calls over split tokens."""
        frame = RankFrame(record, args, kwargs, self)
        frame.errors = self.errors
        return frame


class Part(NamedTuple):
    """What a rank has of a call over split tokens, on the CPU."""

    k: Tensor
    v: Tensor
    q_len: int
    mask: Tensor | None
    """Of the rank's own keys, with four axes; None where the rank was given another one."""


class RankFrame(ObservedFrame):
    """One run of an observed layer's processor on one rank."""

    __slots__ = ("errors", "over_ranks", "whole")

    errors: list[str]
    over_ranks: bool
    """Whether the call is over split tokens."""
    whole: Tensor | None
    """The mask of all keys that the package put together for it."""

    def try_kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **told: Any
    ) -> Tensor | None:
        """As of `ObservedFrame`; but what is no error of a kernel ends the check, on all ranks."""
        self.over_ranks, served = False, self.record.calls.copy()
        out = super(ObservedFrame, self).try_kernel(q, k, v, mask, **told)
        while self.errors:
            self.observer.note(self.record, f"raised {self.errors.pop(0)}")
        if out is None or self.over_ranks:
            return out
        return self.compare(call_of(q, k, v, mask, told), out, served)

    def _try_split(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        split: Split,
        first: int,
        scale: float | None,
        axes_2d: Axes2D,
    ) -> Tensor:
        self.over_ranks, self.whole, served = True, None, self.record.calls.copy()
        ours = super()._try_split(q, k, v, mask, split, first, scale, axes_2d)
        own_mask = None
        if mask is not None and not is_in_factors(mask) and mask.shape[-1] == k.shape[1]:
            own_mask = laid_out(mask, q, k, axes_2d)
        parts = _gathered(Part(k[:, first:], v[:, first:], q.shape[1], own_mask))
        keys = torch.cat([k[:, :first], *(part.k.to(k.device) for part in parts)], 1)
        values = torch.cat([v[:, :first], *(part.v.to(v.device) for part in parts)], 1)
        seen = self._mask_of_all(parts, q.device)
        if self.record.calls == served:  # PyTorch's attention served, on the whole tensors
            return default_attention(q, keys, values, seen, scale, False)
        return self.compare(AttentionCall(q, keys, values, seen, scale), ours, served)

    def _find_whole(self, mask: Tensor, call: object, make: Callable[[], Tensor]) -> Tensor:
        self.whole = super()._find_whole(mask, call, make)
        return self.whole

    def _mask_of_all(self, parts: Sequence[Part], device: torch.device) -> Tensor | None:
        """The mask of all keys: put together here where each rank was given that of its own keys.

        Only the package knows the order of any other mask: there it is the package's, and a wrong
        order shows in the whole.
        """
        own = [part.mask.to(device) for part in parts if part.mask is not None]
        if len(own) == len(parts):
            return torch.cat(own, -1)
        if self.whole is None:
            return None
        mask = self.whole.clone() if is_in_factors(self.whole) else self.whole
        rank, queries = dist.get_rank(), [part.q_len for part in parts]
        if mask.shape[2] in (1, queries[rank]):
            return mask
        return mask.narrow(2, sum(queries[:rank]), queries[rank])


def _gathered(mine: Part) -> list[Part]:
    """The parts of all ranks, in their order."""
    mask = None if mine.mask is None else _copied(mine.mask)
    return of_all_ranks(Part(_copied(mine.k), _copied(mine.v), mine.q_len, mask))


def _copied(x: Tensor) -> Tensor:
    """On the CPU. A view would take all of its storage along."""
    return x.cpu().clone(memory_format=torch.contiguous_format)
