"""One run of a switched layer's processor: tries a kernel for each attention call, and counts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_fa3.attention import Declined, Served, attend
from diffusers_fa3.errors import InputError, UnsupportedModelError
from diffusers_fa3.layers.given import read_arguments
from diffusers_fa3.layers.record import LayerRecord
from diffusers_fa3.masks import Axes2D, Plan, PlanCache, sources_of

PLANS = PlanCache(verify=os.environ.get("DIFFUSERS_FA3_VERIFY_PLANS") == "1")

LEAVE_ATTENTION_OUT = frozenset({"LTX2PerturbedAttnProcessor"})
"""Classes of processors that make no attention call when the caller asks them to skip attention."""


class Frame:
    """One run of a switched layer's processor, on this thread."""

    __slots__ = ("args", "attention_calls", "enclosing", "kwargs", "record")

    def __init__(self, record: LayerRecord, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.record = record
        self.args = args
        self.kwargs = kwargs
        self.attention_calls = 0

    def __enter__(self) -> None:
        self.enclosing = running.frame
        running.frame = self

    def __exit__(self, failed: object, *_: object) -> None:
        running.frame = self.enclosing
        if failed is None and not (self.attention_calls or self._may_leave_attention_out()):
            reason = "makes no attention call that could be switched"
            way_out = "leave the layer out by `layers`"
            self.record.decline(reason, UnsupportedModelError(f"{self.record} {reason}; {way_out}"))

    def _may_leave_attention_out(self) -> bool:
        mro = type(self.record.processor).__mro__
        return any(base.__name__ in LEAVE_ATTENTION_OUT for base in mro)

    def try_kernel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scale: float | None,
        causal: bool,
        axes_2d: Axes2D,
    ) -> Tensor | None:
        """The kernel's output; or None, with the reason counted, if the default must serve."""
        unseen = _what_a_kernel_would_miss(mask)
        if unseen:
            self.decline(unseen)
            return None
        self.attention_calls += 1
        record = self.record
        answer: Served | Declined
        try:
            answer = attend(
                q,
                k,
                v,
                mask,
                scale=scale,
                causal=causal,
                kernel=record.settings.kernel,
                axes_2d=axes_2d,
                pack_queries=record.pack_queries,
                find_plan=self._find_plan,
                switch_id=record.settings.switch_id,
            )
        except InputError as error:
            answer = Declined(str(error), error)
        if isinstance(answer, Declined):
            record.decline(answer.reason, answer.error)
            return None
        if not torch.compiler.is_compiling():
            record.calls[answer.kernel, answer.route] += 1
        return answer.out

    def decline(self, reason: str) -> None:
        """Count a call that goes to the default attention without asking for a kernel."""
        self.attention_calls += 1
        self.record.decline(reason, InputError(f"{reason}: no kernel takes this"))

    def _find_plan(self, mask: Tensor, call: object, make: Callable[[], Plan]) -> Plan:
        """The plan of `mask`, from the cache or new.

        Many diffusers processors build a new mask tensor in every layer, from the same arguments.
        For these masks the cache key is the arguments instead of the tensor, so layers share a
        plan.
        """
        sources, certain = sources_of(mask), True
        given = read_arguments(self.record.processor, self.args, self.kwargs)
        if given is not None and not given.holds(sources):
            sources, certain = tuple(given.masks), given.settles(mask)
            made_by = (type(self.record.processor), self.attention_calls, mask.dtype, mask.shape)
            call = (call, *made_by, *given.rest)
        plan, made = PLANS.find(sources, call, make, certain)
        self.record.plans_made += made
        self.record.plans_reused += not made
        return plan


def _what_a_kernel_would_miss(mask: Tensor | None) -> str:
    """Why only PyTorch's attention can serve the call; empty if a kernel can serve it."""
    if mask is not None and mask.is_meta:
        return "mask on the meta device, where it has no content"
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # torch gives it no types
    for mode in modes:
        # torch's own modes set the device of new tensors. diffusers' perturbed-attention guidance
        # sets a mode that makes PyTorch's attention return v. A mode that only observes calls says
        # so by `leaves_attention_alone`.
        looks_on = getattr(mode, "leaves_attention_alone", False)
        if not (looks_on or type(mode).__module__.startswith("torch.")):
            return f"{type(mode).__name__} is active, which may replace PyTorch's attention"
    return ""


class _Running(threading.local):
    def __init__(self) -> None:
        # Set on the instance at once, since Dynamo guards that the attribute is there.
        self.frame: Frame | None = None


running = _Running()
