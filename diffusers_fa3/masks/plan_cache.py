"""Reuse of plans: layers share masks, and making a plan costs a read from the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from diffusers_fa3.errors import FA3Error
from diffusers_fa3.masks.meaning import Opaque
from diffusers_fa3.masks.packing import PackingPlan
from diffusers_fa3.options import Lengths

Plan = PackingPlan | Opaque

CAPACITY = 256
"""The most plans kept: more than the models of a process use in one forward."""


class PlanCache:
    """Plans, keyed by their source tensors. A plan is valid while its sources live unchanged.

    A source is identified by its base tensor (held weakly), the base's version, which every
    in-place edit raises, and the source's view of the base. Addresses do not serve: memory is
    reused. Inference tensors have no version, so edits of them cannot be seen: their plans are not
    kept.

    Args:
        verify: at every reuse, also make the plan again and compare. Slow; finds wrong reuse.
    """

    def __init__(self, verify: bool = False) -> None:
        self.verify = verify
        self._plans: OrderedDict[object, tuple[tuple[TensorWeakRef, ...], Plan]] = OrderedDict()
        self._lock = Lock()

    def find(
        self,
        sources: Sequence[Tensor],
        call: object,
        make: Callable[[], Plan],
        certain: bool = True,
    ) -> tuple[Plan, bool]:
        """The plan for `sources` and `call`, and whether it was made just now.

        Args:
            sources: the tensors that the plan depends on.
            call: whatever else the plan depends on, such as sizes and options; hashable.
            make: makes the plan if none is kept.
            certain: whether `sources` and `call` surely determine the plan. If False, a kept plan
                is reused only if it is an `Opaque`: the default attention then serves the call, and
                it is right for any mask.

        Raises:
            FA3Error: with `verify`, the kept plan differs from the plan made again.
        """
        if any(source.is_inference() for source in sources):
            return make(), True
        bases = [base_of(source) for source in sources]
        key = (tuple(map(_view, sources, bases)), call)
        remembered = self._plans.get(key)
        if remembered is not None and (certain or isinstance(remembered[1], Opaque)):
            references, plan = remembered
            if all(ref() is base for ref, base in zip(references, bases)):
                if self.verify and certain and not _same(plan, make()):
                    raise FA3Error(f"a plan was reused for another mask; call: {call}")
                return plan, False
        plan = make()
        with self._lock:
            self._forget_the_dead()
            self._plans[key] = (tuple(map(TensorWeakRef, bases)), plan)
        return plan, True

    def _forget_the_dead(self) -> None:
        for key, (references, _) in list(self._plans.items()):
            if any(reference() is None for reference in references):
                del self._plans[key]
        while len(self._plans) >= CAPACITY:
            self._plans.popitem(last=False)


def base_of(source: Tensor) -> Tensor:
    """The tensor that `source` is a view of, or `source` itself if it is no view."""
    return source if source._base is None else source._base


def _same(plan: Plan, other: Plan) -> bool:
    if isinstance(plan, Opaque) or isinstance(other, Opaque):
        return plan == other
    return all(_alike(getattr(plan, f.name), getattr(other, f.name)) for f in fields(plan))


def _alike(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, PackingPlan) and isinstance(two, PackingPlan):
        return _same(one, two)
    if isinstance(one, Lengths) and isinstance(two, Lengths):
        return all(map(_alike, one, two))
    return one == two


def _view(source: Tensor, base: Tensor) -> tuple[object, ...]:
    return (
        id(base),
        base._version,
        source.dtype,
        source.shape,
        source.stride(),
        source.storage_offset(),
    )
