"""One run of a switched layer's processor: tries a kernel for each attention call, and counts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fa3.attention import Declined, Served, attend, no_kernel_takes
from diffusers_fa3.errors import InputError, ParallelError, UnsupportedModelError
from diffusers_fa3.fastest import FASTEST, attend_fastest
from diffusers_fa3.kernels import needs_grad
from diffusers_fa3.layers.given import arguments_of, read_arguments
from diffusers_fa3.layers.record import LayerRecord
from diffusers_fa3.masks import Axes2D, Plan, PlanCache, PlanCall, sources_of
from diffusers_fa3.parallel import Memory, Split, attend_split, distributed, split_of

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
        told: bool,
        parallel_config: Any = None,
        reason: str = "",
    ) -> Tensor | None:
        """The kernel's output; or None, with the reason counted, if the default must serve.

        Arguments are those of `attend`, and: whether the processor calls diffusers' dispatcher
        (`told`), so that it can say by `parallel_config` that its tokens are split over ranks; why
        no kernel can take the call, if that is known already (`reason`).
        """
        reason = reason or _what_a_kernel_would_miss()
        record = self.record
        home = record.home
        may_be_split = distributed() if home is None else home.is_split()
        if may_be_split or parallel_config is not None:
            layer = self.args[0] if self.args else None  # as diffusers' layers pass themselves
            # A graph would be compiled anew for each forward, if it knew of them.
            forward = None if torch.compiler.is_compiling() else running.plans.forward
            split = split_of(home, layer, record.processor, parallel_config, told, forward)
            first = 0 if split is None else sum(self._lengths_of((split.whole_first,)) or ())
            if split is not None and not (first and first == k.shape[1]):
                unlearned = not split.trains and needs_grad(q, k, v)
                _refuse_if(reason, causal, unlearned)
                return self._try_split(q, k, v, mask, split, first, scale, axes_2d)
        if reason:
            self.decline(reason)
            return None
        self.attention_calls += 1
        answer: Served | Declined
        serve = attend_fastest if record.settings.kernel == FASTEST else attend
        try:
            answer = serve(
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
            self._leave(answer)
            return None
        self._count(answer)
        return answer.out

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
        """The output of a call over tokens that are split over ranks, on a kernel or not."""
        self.attention_calls += 1
        record = self.record
        out, served = attend_split(
            q,
            k,
            v,
            mask,
            split.axes,
            scale=scale,
            kernel=record.settings.kernel,
            axes_2d=axes_2d,
            pack_queries=record.pack_queries,
            switch_id=record.settings.switch_id,
            segments=self._lengths_of(split.order),
            first=first,
            memory=Memory(self._find_whole, self._find_plan_of_whole),
            decline=self._leave,
        )
        if served is not None:
            self._count(served)
        return out

    def _count(self, served: Served) -> None:
        """Count a call that a kernel served."""
        if not torch.compiler.is_compiling():
            self.record.calls[served.kernel, served.route] += 1
            if served.lead:
                self.record.choices[f"{served.kernel}, {served.lead:.1f}x"] += 1

    def _leave(self, declined: Declined) -> None:
        """Count a call of the default attention: by choice, or since no kernel took it."""
        if declined.lead:
            self.record.choices[f"default, {declined.lead:.1f}x"] += 1
        else:
            self.record.decline(declined.reason, declined.error)

    def _lengths_of(self, order: tuple[str, ...]) -> list[int] | None:
        """The lengths of the processor's arguments of these names; None if it lacks one of them."""
        if not any(order):
            return []
        named = arguments_of(self.record.processor, self.args, self.kwargs)
        if any(named.get(name) is None for name in order):
            return None
        return [named[name].shape[-2] for name in order]

    def decline(self, reason: str) -> None:
        """Count a call that goes to the default attention without asking for a kernel."""
        self.attention_calls += 1
        self.record.decline(reason, no_kernel_takes(reason).error)

    def _find_plan(self, mask: Tensor, call: PlanCall, make: Callable[[], Plan]) -> Plan:
        """The plan of `mask`, from the cache or new."""
        sources, made_by, certain = self._identity(mask)
        plan, made = running.plans.find(sources, (call, *made_by), make, certain)
        self._count_plan(made)
        return plan

    def _find_whole(self, mask: Tensor, call: object, make: Callable[[], Tensor]) -> Tensor:
        """The mask of all ranks' keys that `mask` is a part of, from the cache or new."""
        if torch.compiler.is_compiling():
            return make()
        sources, made_by, certain = self._identity(mask)
        return running.plans.find(sources, ("whole", call, *made_by), make, certain)[0]

    def _find_plan_of_whole(self, mask: Tensor, call: PlanCall, make: Callable[[], Plan]) -> Plan:
        plan, made = running.plans.find(sources_of(mask), call, make)
        self._count_plan(made)
        return plan

    def _count_plan(self, made: bool) -> None:
        self.record.plans_made += made
        self.record.plans_reused += not made

    def _identity(self, mask: Tensor) -> tuple[Sequence[Tensor], tuple[object, ...], bool]:
        """What tells a mask from others: tensors, what else, and whether these surely do.

        Many diffusers processors build a new mask tensor in every layer, from the same arguments.
        Such a mask is known by the arguments instead of the tensor, so layers share a plan.
        """
        sources = sources_of(mask)
        given = read_arguments(self.record.processor, self.args, self.kwargs)
        if given is None or given.holds(sources):
            return sources, (), True
        made_by = (type(self.record.processor), self.attention_calls, mask.dtype, mask.shape)
        return given.masks, (*made_by, *given.rest), given.settles(mask)


def _refuse_if(reason: str, causal: bool, unlearned: bool) -> None:
    """Raise if a call over split tokens has something that ranks cannot share."""
    if unlearned:
        raise ParallelError(
            "context parallelism: gradients, of a model whose plan gathers tokens in front of "
            "other layers: diffusers' gather passes none on to other ranks. Call under "
            "torch.no_grad(), or train this model on one GPU"
        )
    if causal:
        raise ParallelError(
            "context parallelism: causal attention over shards, whose order is not that of the "
            "tokens; run this model on one GPU"
        )
    if reason:
        raise ParallelError(
            f"context parallelism: {reason}; the default attention would serve, and each rank "
            "would see its own tokens only. Call without it, or run this model on one GPU"
        )


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
