"""Reuse of plans in a forward: layers share masks, and making a plan costs a read of the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from diffusers_fa3.errors import FA3Error
from diffusers_fa3.masks.meaning import Opaque
from diffusers_fa3.masks.packing import PackingPlan
from diffusers_fa3.masks.read import Axes2D
from diffusers_fa3.options import Lengths

Plan = PackingPlan | Opaque
Alive = Callable[[], bool]
Found = TypeVar("Found")


class PlanCall(NamedTuple):
    """Everything but the mask that a plan depends on."""

    sizes: tuple[int, int, int, int]
    """B, H, Sq, Sk."""
    axes_2d: Axes2D
    seqused: bool
    pack_queries: bool


FindPlan = Callable[[Tensor, PlanCall, Callable[[], Plan]], Plan]
"""(mask, the rest that the plan depends on, a function that makes the plan) -> the plan.

A caller with many layers passes one, so that a plan made for an earlier layer is found again.
"""

CAPACITY = 256
"""The most plans kept: more than the models of a process use in one forward."""


class PlanCache:
    """The plans of one forward on one thread, keyed by their source tensors.

    A source is identified by its memory (watched, since memory is reused), its version, which
    in-place edits raise, and its view of the memory. But `torch.distributed`, NumPy and
    `tensor.data` write without raising the version, and inference tensors have none. So a plan is
    kept for one forward only: see `begin`.

    Attributes:
        forward: an object of the forward that runs, another one for each.

    Args:
        verify: at every reuse, also make the plan again and compare. Slow; finds wrong reuse.
    """

    def __init__(self, verify: bool = False) -> None:
        self.verify = verify
        self._plans: OrderedDict[object, tuple[list[Alive], Any]] = OrderedDict()
        self._model: object = None
        self._layers: set[int] = set()
        self.forward = object()

    def begin(self, model: object, layer: int) -> None:
        """Note that a layer runs, and forget all plans if it begins another forward.

        A forward is over when a layer runs that ran in it before, or a layer of another model. A
        layer that runs twice in a forward costs one more read.

        Args:
            model: tells models apart, by equality.
            layer: tells the layers of a model apart.
        """
        layers = self._layers
        if layer in layers or model != self._model:
            self._plans.clear()
            self.forward = object()
            layers.clear()
            self._model = model
        layers.add(layer)

    def find(
        self,
        sources: Sequence[Tensor],
        call: object,
        make: Callable[[], Found],
        certain: bool = True,
    ) -> tuple[Found, bool]:
        """The plan for `sources` and `call`, and whether it was made just now.

        The whole of a mask of which ranks have parts is kept and found in the same way.

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
        key = (tuple(map(_view, sources)), call)
        remembered = self._plans.get(key)
        if remembered is not None and (certain or isinstance(remembered[1], Opaque)):
            alive, plan = remembered
            if all(is_alive() for is_alive in alive):
                if self.verify and certain and not _alike(plan, make()):
                    raise FA3Error(
                        f"a plan was reused for another mask; got {call}. Edit no mask between two "
                        "layers of a forward"
                    )
                return plan, False
        plan = make()
        self._forget_the_dead()
        self._plans[key] = (list(map(_watch, sources)), plan)
        return plan, True

    def _forget_the_dead(self) -> None:
        for key, (alive, _) in list(self._plans.items()):
            if not all(is_alive() for is_alive in alive):
                del self._plans[key]
        while len(self._plans) >= CAPACITY:
            self._plans.popitem(last=False)


def memory_of(source: Tensor) -> int:
    """Tells the memory of living tensors apart: the same for a tensor and its views."""
    if source.is_inference():  # its views do not know what they are views of
        return int(source.untyped_storage()._cdata)
    return id(_base(source))


def _watch(source: Tensor) -> Alive:
    """Whether the memory of a tensor is still the same as now, whenever that is asked."""
    if source.is_inference():
        storage: Any = StorageWeakRef(source.untyped_storage())  # type: ignore[no-untyped-call]  # torch gives it no types
        return lambda: not storage.expired()
    base = TensorWeakRef(_base(source))
    return lambda: base() is not None


def _base(source: Tensor) -> Tensor:
    return source if source._base is None else source._base


def _alike(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, PackingPlan) and isinstance(two, PackingPlan):
        return all(_alike(getattr(one, f.name), getattr(two, f.name)) for f in fields(one))
    if isinstance(one, Lengths) and isinstance(two, Lengths):
        return all(map(_alike, one, two))
    return one == two


def _view(source: Tensor) -> tuple[object, ...]:
    return (
        memory_of(source),
        0 if source.is_inference() else source._version,
        source.dtype,
        source.shape,
        source.stride(),
        source.storage_offset(),
    )
