"""What a processor calls in place of PyTorch's and diffusers' attention, and what it is counted on.

A processor runs inside a `Frame`, which knows the layer that it serves. The two functions below
have the signatures of those that they replace, and hand the call to that frame.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from types import NoneType
from typing import Any, Literal

import torch
from diffusers.models import attention_dispatch
from torch import Tensor
from torch.nn import functional as F

from diffusers_fa3.attention import Declined, Served, attend
from diffusers_fa3.errors import (
    FA3Error,
    FallbackWarning,
    InputError,
    KernelUnavailableError,
    UnsupportedModelError,
)
from diffusers_fa3.kernels import KernelChoice, note_declined
from diffusers_fa3.layers import host
from diffusers_fa3.layers.given import read_arguments
from diffusers_fa3.masks import Axes2D, Plan, PlanCache, sources_of

host.check()

Fallback = Literal["warn", "error", "silent"]

PLANS = PlanCache(verify=os.environ.get("DIFFUSERS_FA3_VERIFY_PLANS") == "1")


@dataclass(frozen=True)
class Settings:
    """What the user asked for, shared by the layers that were switched together."""

    kernel: KernelChoice = "auto"
    fallback: Fallback = "warn"
    warned: set[tuple[str, str]] = field(default_factory=set, compare=False)
    """(processor class, reason) of the warnings that were given."""
    owner: int = field(default_factory=count(1).__next__, compare=False)
    """By which compiled graphs know whose calls they make: they cannot count on a layer."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is another owner."""
        return Settings, (self.kernel, self.fallback)


@dataclass(eq=False)
class Layer:
    """A switched layer: the processor that it had, and what became of its attention calls."""

    processor: Any
    """None: no single layer, but diffusers' process-wide backend."""
    settings: Settings
    name: str = ""
    pack_queries: bool = False
    """Whether padded tokens are left out as queries, too."""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kernel and route."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """By reason."""
    plans_made: int = 0
    plans_reused: int = 0

    def decline(self, reason: str, error: FA3Error) -> None:
        """Count a call that the default attention serves; raise or warn as the user asked."""
        refused = isinstance(error, KernelUnavailableError) and self.settings.kernel != "auto"
        if refused or self.settings.fallback == "error":
            raise error
        if torch.compiler.is_compiling():
            note_declined(self.settings.owner, reason, self.settings.fallback == "warn")
            return
        self.fallbacks[reason] += 1
        warning = (type(self.processor).__name__, reason)
        if self.settings.fallback == "warn" and warning not in self.settings.warned:
            self.settings.warned.add(warning)
            warnings.warn(
                f"{self}: the default attention serves: {reason}", FallbackWarning, stacklevel=2
            )

    def __str__(self) -> str:
        own = [] if self.processor is None else [type(self.processor).__name__]
        return " of ".join([*own, *filter(None, [self.name])])


LEAVE_ATTENTION_OUT = frozenset({"LTX2PerturbedAttnProcessor"})
"""Processors that make no attention call where that is what they are told to do."""


class Frame:
    """One run of a switched layer's processor, on this thread."""

    __slots__ = ("args", "attention_calls", "kwargs", "layer", "outer")

    def __init__(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer = layer
        self.args = args
        self.kwargs = kwargs
        self.attention_calls = 0

    def __enter__(self) -> None:
        self.outer = _running.frame
        _running.frame = self

    def __exit__(self, failed: object, *_: object) -> None:
        _running.frame = self.outer
        if failed is None and not (self.attention_calls or self._may_leave_attention_out()):
            reason = "makes no attention call that could be switched"
            way_out = "leave the layer out by `layers`"
            self.layer.decline(reason, UnsupportedModelError(f"{self.layer} {reason}; {way_out}"))

    def _may_leave_attention_out(self) -> bool:
        mro = type(self.layer.processor).__mro__
        return any(base.__name__ in LEAVE_ATTENTION_OUT for base in mro)

    def attend(
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
        """The kernel's output, or None, counted, where the default attention is to serve."""
        unseen = _what_a_kernel_would_miss(mask)
        if unseen:
            self.decline(unseen)
            return None
        self.attention_calls += 1
        layer = self.layer
        answer: Served | Declined
        try:
            answer = attend(
                q,
                k,
                v,
                mask,
                scale=scale,
                causal=causal,
                kernel=layer.settings.kernel,
                axes_2d=axes_2d,
                pack_queries=layer.pack_queries,
                find_plan=self._find_plan,
                owner=layer.settings.owner,
            )
        except InputError as error:
            answer = Declined(str(error), error)
        if isinstance(answer, Declined):
            layer.decline(answer.reason, answer.error)
            return None
        if not torch.compiler.is_compiling():
            layer.calls[answer.kernel, answer.route] += 1
        return answer.out

    def decline(self, reason: str) -> None:
        """The default attention is to serve this call; no kernel need be asked."""
        self.attention_calls += 1
        self.layer.decline(reason, InputError(f"{reason}: no kernel takes this"))

    def _find_plan(self, mask: Tensor, call: object, make: Callable[[], Plan]) -> Plan:
        """The plan of an earlier layer that was given the same masks, or of this very mask.

        Many of diffusers' processors build the mask of their attention call anew, in every layer,
        from what they were given; there it is that which is recognised.
        """
        sources, certain = sources_of(mask), True
        given = read_arguments(self.layer.processor, self.args, self.kwargs)
        if given is not None and not given.holds(sources):
            sources, certain = tuple(given.masks), given.settles(mask)
            made_by = (type(self.layer.processor), self.attention_calls, mask.dtype, mask.shape)
            call = (call, *made_by, *given.rest)
        plan, made = PLANS.find(sources, call, make, certain)
        self.layer.plans_made += made
        self.layer.plans_reused += not made
        return plan


def _what_a_kernel_would_miss(mask: Tensor | None) -> str:
    """What only PyTorch's attention can follow; empty where there is nothing of the kind."""
    if mask is not None and mask.is_meta:
        return "mask on the meta device, where it has no content"
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # torch gives it no types
    for mode in modes:
        # torch's own give new tensors a device. diffusers' perturbed-attention guidance sets one
        # that has PyTorch's attention return v. One that only looks on says so.
        looks_on = getattr(mode, "leaves_attention_alone", False)
        if not (looks_on or type(mode).__module__.startswith("torch.")):
            return f"{type(mode).__name__} is active, which may replace PyTorch's attention"
    return ""


class _Running(threading.local):
    def __init__(self) -> None:
        # On the instance from the first: Dynamo guards that it is there.
        self.frame: Frame | None = None


_running = _Running()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, as a switched processor sees it."""
    frame = _running.frame
    if frame is not None:
        if dropout_p > 0:
            frame.decline("attention dropout")
        elif not query.ndim == key.ndim == value.ndim == 4:
            frame.decline("tensors that are not (B, H, S, D)")
        else:
            out = frame.attend(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask,
                scale=scale,
                causal=is_causal,
                axes_2d="qk",
            )
            if out is not None:
                return out.transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
    **later: Any,
) -> Tensor:
    """Diffusers' `dispatch_attention_fn`, as a switched processor sees it: tensors (B, S, H, D)."""
    frame = _running.frame
    if frame is not None:
        reason = _why_not_dispatched(attention_kwargs, backend, later)
        if reason:
            frame.decline(reason)
        else:
            out = attend_dispatched(
                frame, query, key, value, attn_mask, dropout_p, is_causal, scale, parallel_config
            )
            if out is not None:
                return out
    out = attention_dispatch.dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        attention_kwargs,
        backend=backend,
        parallel_config=parallel_config,
        **later,
    )
    assert isinstance(out, Tensor)
    return out


def _why_not_dispatched(
    attention_kwargs: dict[str, Any] | None, backend: Any, later: dict[str, Any]
) -> str:
    """Why a call is meant for another backend; empty where it is not."""
    pinned = getattr(backend, "value", backend)
    if pinned not in (None, "fa3"):
        return f"the layer is set to backend {pinned}"
    if attention_kwargs or later:
        return f"options for one backend: {', '.join([*(attention_kwargs or ()), *later])}"
    return ""


def attend_dispatched(
    frame: Frame,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    dropout_p: float,
    causal: bool,
    scale: float | None,
    parallel_config: Any,
) -> Tensor | None:
    """`Frame.attend` for the arguments that diffusers' backends get: tensors (B, S, H, D)."""
    if parallel_config is not None:
        frame.decline("context parallelism")
    elif dropout_p > 0:
        frame.decline("attention dropout")
    elif not isinstance(mask, (Tensor, NoneType)):  # Dynamo of torch 2.9 knows no Tensor | None
        frame.decline(f"mask of type {type(mask).__name__}")
    else:
        # diffusers' native backend reads a 2-D mask as (B, Sk) where it is one, and leaves any
        # other to SDPA, which takes it as (Sq, Sk).
        per_key = mask is not None and mask.shape == (query.shape[0], key.shape[1])
        return frame.attend(
            query,
            key,
            value,
            mask,
            scale=scale,
            causal=causal,
            axes_2d="bk" if per_key else "qk",
        )
    return None
