"""Whatever is done with masks between one look and the next, a plan is never that of another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from diffusers_fa3.masks import plan_cache
from diffusers_fa3.masks.plan_cache import Plan, PlanCache
from diffusers_fa3.masks.planning import try_plan

from . import tried
from .tensors import seeds

SHAPE = (2, 2, 3, 4)
KEPT = 4
"""Masks at a time: so few that the same ones are met again and again."""

CAPACITY = 6
"""Plans at a time: fewer than are looked for."""

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "the first sample": lambda m: m[:1],
    "the last sample": lambda m: m[-1:],
    "one head": lambda m: m[:, :1],
    "one query": lambda m: m[:, :, :1],
    "keys from the second on": lambda m: m[..., 1:],
    "every second key": lambda m: m[..., ::2],
    "transposed": lambda m: m.mT,
    "samples for heads": lambda m: m.transpose(0, 1),
    "the same": lambda m: m[:],
    "for three samples": lambda m: m[:1].expand(3, -1, -1, -1),
    "detached": lambda m: m.detach(),
    "as bytes": lambda m: m.view(torch.uint8) if m.dtype == torch.bool else m,
    "contiguous": lambda m: m.contiguous(),
    "a copy": lambda m: m.clone(),
}
EDITS: dict[str, Callable[[Tensor], object]] = {
    "an item": lambda m: m[-1, -1, -1, -1].logical_not_(),
    "a column": lambda m: m[..., 0].logical_not_(),
    "by an index": lambda m: m.__setitem__((slice(None), 0), m[:, 0].logical_not()),
    "all of it": lambda m: m.logical_not_(),
    "filled": lambda m: m.fill_(1),
    "copied over": lambda m: m.copy_(m.flip(-1)),
    "where masked": lambda m: m.masked_fill_(torch.eye(m.shape[-2], m.shape[-1]).bool(), 0),
    "as an output": lambda m: torch.logical_not(m, out=m),
    "by nothing": lambda m: m.copy_(m.clone()),
}
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "with gradients": nullcontext,
    "without gradients": torch.no_grad,
    "in inference mode": torch.inference_mode,
}

some = st.integers(0, 100)
modes = st.sampled_from(list(MODES))


class Masks(RuleBasedStateMachine):
    """Masks that come, are viewed, edited, looked at and go."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PlanCache(verify=True)
        self.masks = [torch.ones(SHAPE, dtype=torch.bool)]
        self.capacity, plan_cache.CAPACITY = plan_cache.CAPACITY, CAPACITY

    def teardown(self) -> None:
        plan_cache.CAPACITY = self.capacity

    def at(self, i: int) -> Tensor:
        return self.masks[i % len(self.masks)]

    def keep(self, mask: Tensor) -> None:
        self.masks = [*self.masks[1 - KEPT :], mask]

    @rule(seed=seeds, number=st.booleans(), mode=modes)
    def make(self, seed: int, number: bool, mode: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        with MODES[mode]():
            keys = torch.rand(SHAPE[0], 1, 1, SHAPE[3], generator=generator) < 0.6
            mask = keys.expand(SHAPE).clone()
            self.keep(mask.int() if number else mask)

    @rule(i=some, name=st.sampled_from(list(VIEWS)), mode=modes)
    def view(self, i: int, name: str, mode: str) -> None:
        with MODES[mode]():
            self.keep(VIEWS[name](self.at(i)))

    @rule(i=some)
    def split(self, i: int) -> None:
        for half in self.at(i).chunk(2):
            self.keep(half)

    @rule(i=some, name=st.sampled_from(list(EDITS)), mode=modes)
    def edit(self, i: int, name: str, mode: str) -> None:
        mask = self.at(i)
        for axis, step in enumerate(mask.stride()):
            if step == 0:  # expanded: torch writes to none of these
                mask = mask.narrow(axis, 0, min(1, mask.shape[axis]))
        with MODES["in inference mode" if mask.is_inference() else mode]():
            if mask.numel():
                EDITS[name](mask)
        if mode == "in inference mode" or any(mask.is_inference() for mask in self.masks):
            self.next_forward()  # an inference tensor has no version, nor have its views

    @rule(i=some)
    def edit_unseen(self, i: int) -> None:
        """As `dist.broadcast` and NumPy do, without PyTorch's knowing."""
        mask = self.at(i)
        with MODES["in inference mode" if mask.is_inference() else "without gradients"]():
            mask = mask.data
            for axis, step in enumerate(mask.stride()):
                mask = mask.narrow(axis, 0, min(1, mask.shape[axis])) if step == 0 else mask
            mask.copy_(1 - mask.int())
        self.next_forward()

    @rule()
    def next_forward(self) -> None:
        self.cache.begin("model", 0)
        self.cache.begin("model", 0)

    @rule(i=some)
    def drop(self, i: int) -> None:
        if len(self.masks) > 1:
            del self.masks[i % len(self.masks)]

    @rule(i=some, edited=st.booleans())
    def replace(self, i: int, edited: bool) -> None:
        """By another one, which may get the memory, and the id, of the first."""
        old = self.masks.pop(i % len(self.masks))
        values, dtype = (old.logical_not() if edited else old).tolist(), old.dtype
        del old
        self.masks.append(torch.tensor(values, dtype=dtype))

    @rule(i=some, j=some)
    def look_at_two(self, i: int, j: int) -> None:
        """As where a processor makes a mask of two, by some rule of its own."""
        queries, keys = self.at(i)[:1, :1, :1], self.at(j)[:1, :1, :1]

        def make() -> Plan:
            return plan_of(queries.mT.bool() & keys.bool(), seqused=True)

        plan, _ = self.cache.find([self.at(i), self.at(j)], "two", make)
        assert plan_cache._alike(plan, make())

    @invariant()
    def every_plan_is_that_of_its_mask(self) -> None:
        for seqused in (True, False):
            for mask in self.masks:
                self.look(mask, seqused)
        assert len(self.cache._plans) <= CAPACITY

    def look(self, mask: Tensor, seqused: bool) -> None:
        def make() -> Plan:
            return plan_of(mask, seqused)

        plan, _ = self.cache.find([mask], seqused, make)
        assert plan_cache._alike(plan, make())
        assert self.cache.find([mask], seqused, make) == (plan, False)


def plan_of(mask: Tensor, seqused: bool) -> Plan:
    batch, heads, q_len, k_len = mask.shape
    return try_plan(mask, (batch, heads, q_len, k_len), axes_2d="bk", seqused=seqused)


Masks.TestCase.settings = settings(tried(4), stateful_step_count=12)
TestAnyUseOfPlans = Masks.TestCase
