"""Switched layers whose attention calls are compared as they run, and that go on as the default.

A switched processor runs in a `Frame`, which tries a kernel for each attention call. Here the frame
is one that also runs the default attention on the same tensors, compares both with float64, and
returns the default's output. So each call has the very inputs that it has in a run on the default.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusers_fa3.attention import default_attention
from diffusers_fa3.layers import FA3AttnProcessor, Frame, LayerRecord, begin, record_of
from diffusers_fa3.masks import Axes2D, as_4d, is_in_factors
from diffusers_fa3.tools.check.budget import measure
from diffusers_fa3.tools.check.exact import AttentionCall
from diffusers_fa3.tools.check.parity import Call, Raised


@dataclass
class Observer:
    """What the observed layers did so far."""

    on_call: Callable[[], None]
    """Called after each comparison."""
    rank: int | None = None
    """Of the process, where the model is split over several."""
    calls: list[Call] = field(default_factory=list)
    raised: list[Raised] = field(default_factory=list)
    runs: Counter[str] = field(default_factory=Counter)
    """Calls of each layer."""

    def frame(
        self, record: LayerRecord, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ObservedFrame:
        """A frame for a run of a layer's processor."""
        return ObservedFrame(record, args, kwargs, self)

    def add(self, call: Call) -> None:
        """Keep a comparison."""
        self.calls.append(call)
        self.runs[call.layer] += 1
        self.on_call()

    def note(self, record: LayerRecord, error: str) -> None:
        """Keep an error of the kernel in a layer."""
        kernel = words_of_kernel(record.settings.kernel)
        self.raised.append(Raised(record.name, kernel, error, self.rank))


class ObservedFrame(Frame):
    """One run of an observed layer's processor."""

    __slots__ = ("observer",)

    def __init__(
        self,
        record: LayerRecord,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observer: Observer,
    ) -> None:
        super().__init__(record, args, kwargs)
        self.observer = observer

    def try_kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **told: Any
    ) -> Tensor | None:
        """The default's output of a call that a kernel serves, too; None for any other call."""
        served = self.record.calls.copy()
        try:
            ours = super().try_kernel(q, k, v, mask, **told)
        except Exception as error:  # a kernel may raise any; the check tells
            self.observer.note(self.record, f"raised {type(error).__name__}: {error}")
            return None
        return None if ours is None else self.compare(call_of(q, k, v, mask, told), ours, served)

    def compare(
        self, call: AttentionCall, ours: Tensor, served: Counter[tuple[str, str]]
    ) -> Tensor:
        """Compare a kernel's output with the default's, which is returned.

        `served` is what kernels had served in this layer before.
        """
        record, q, mask = self.record, call.q, call.mask
        ((kernel, route),) = (record.calls - served).keys()
        default = default_attention(*call)
        self.observer.add(
            Call(
                record.name,
                self.observer.runs[record.name],
                kernel,
                route,
                str(q.dtype).removeprefix("torch."),
                tuple(q.shape),
                call.k.shape[1],
                "" if mask is None else f"{mask.dtype} {tuple(mask.shape)}".removeprefix("torch."),
                measure(call, default, ours),
                self.observer.rank,
            )
        )
        return default


def call_of(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, told: dict[str, Any]
) -> AttentionCall:
    """What a frame is asked to compute, with a mask that is laid out."""
    mask = laid_out(mask, q, k, told["axes_2d"])
    return AttentionCall(q, k, v, mask, told["scale"], told["causal"])


def laid_out(mask: Tensor | None, q: Tensor, k: Tensor, axes_2d: Axes2D) -> Tensor | None:
    """A mask of these queries and keys with four axes, none of it in factors."""
    if mask is None:
        return None
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return as_4d(mask.clone() if is_in_factors(mask) else mask, sizes, axes_2d)


def words_of_kernel(kernel: Any) -> str:
    """The name of a kernel that was asked for by name or is a function."""
    return kernel if isinstance(kernel, str) else str(getattr(kernel, "__name__", kernel))


@contextmanager
def observed(modules: Iterable[nn.Module], observer: Observer) -> Iterator[None]:
    """Have the switched layers among `modules` observed, on this thread and not compiled."""
    classes: dict[type, type] = {}
    before: list[tuple[Any, Any]] = []
    for module in modules:
        layer: Any = module
        processor = getattr(layer, "processor", None)
        if record_of(processor) is not None:
            before.append((layer, processor))
    try:
        for layer, processor in before:
            wrapped = type(processor)
            if wrapped not in classes:
                classes[wrapped] = _observed_class(wrapped, observer)
            made: Any = object.__new__(classes[wrapped])
            object.__setattr__(made, "__dict__", processor.__dict__)
            object.__setattr__(made, "_fa3", record_of(processor))
            layer.processor = made
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, processor in before:
            layer.processor = processor


def _observed_class(wrapped: type, observer: Observer) -> type:
    """A class of switched processors, with observed frames."""
    behind = wrapped.__mro__[wrapped.__mro__.index(FA3AttnProcessor) + 1 :]
    own_call = next(vars(base)["__call__"] for base in behind if "__call__" in vars(base))

    @functools.wraps(cast(Any, wrapped).__call__)
    def __call__(self: FA3AttnProcessor, *args: Any, **kwargs: Any) -> Any:
        record = self._fa3
        begin(record, args)
        with observer.frame(record, args, kwargs):
            return own_call(self, *args, **kwargs)

    members = {"__slots__": (), "__call__": __call__, "__module__": wrapped.__module__}
    return type(wrapped)(wrapped.__name__, (wrapped,), members)
