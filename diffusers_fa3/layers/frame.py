"""One run of a switched layer's processor: tries a kernel for each attention call, and counts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fa3.attention import Declined, Served, attend
from diffusers_fa3.errors import InputError, UnsupportedModelError
from diffusers_fa3.layers.given import read_arguments
from diffusers_fa3.layers.record import LayerRecord
from diffusers_fa3.masks import Axes2D, Plan, PlanCache, sources_of

UNREACHED = "makes no attention call that could be switched"

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
        if failed is None and not (self.attention_calls or self._leaves_attention_out()):
            words = f"{self.record} {UNREACHED}; leave the layer out by `layers`"
            self.record.decline(UNREACHED, UnsupportedModelError(words))

    def _leaves_attention_out(self) -> bool:
        """Whether the processor chose to make no call: it is known to, or it made one before."""
        if not torch.compiler.is_compiling() and (self.record.calls or self.record.fallbacks):
            self.record.skipped += UNREACHED not in self.record.fallbacks
            return UNREACHED not in self.record.fallbacks
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
        unseen = _what_a_kernel_would_miss()
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
        plan, made = running.plans.find(sources, call, make, certain)
        self.record.plans_made += made
        self.record.plans_reused += not made
        return plan


def _what_a_kernel_would_miss() -> str:
    """Why only PyTorch's attention can serve the call; empty if a kernel can serve it."""
    if not torch._C._len_torch_function_stack():
        return ""
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
        self.plans = PlanCache(verify=os.environ.get("DIFFUSERS_FA3_VERIFY_PLANS") == "1")


running = _Running()


def begin(record: LayerRecord, args: tuple[Any, ...]) -> None:
    """Note that a layer runs: plans of an earlier forward are forgotten. Not for graphs.

    Several layers may share a processor that was wrapped by hand. They are told apart by the
    processor's first argument, which is the layer in diffusers.
    """
    layer: object = record
    if record.model is None and args and isinstance(args[0], nn.Module):
        layer = args[0]
    running.plans.begin(record.model, id(layer))
