"""Count, on a CPU, the reads that would make the host wait for a GPU.

Two memories are simulated. The device `cpu:0` has models, their inputs, and all tensors computed
from these. The host `cpu` has tensors made without a device, tensors copied from the device, and
all tensors computed from host tensors alone. Reads of host tensors are not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_fa3 import flash_attn_varlen_func

DEVICE, HOST = torch.device("cpu:0"), torch.device("cpu")

MOVES = (torch.Tensor.cpu, torch.Tensor.to)
COPIES = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.tensor)
"""On a CPU, torch dispatches nothing for these functions, so the calls themselves are counted."""
WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""Tags of operations that return a Python value, or a tensor whose size depends on values."""
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
UNSEEN = ("from_numpy", "frombuffer")
"""Functions that make tensors and bypass every mode."""


class HostReads(TorchFunctionMode):
    """Counts reads of the device; `places` has the operation and source line of each."""

    leaves_attention_alone = True

    def __init__(self) -> None:
        self.places: list[str] = []
        self.on_device = False
        """Whether the function that is running has arguments on the device."""
        self._dispatched = _Dispatched(self)
        self._makers = mock.patch.multiple(torch, **{n: _maker(getattr(torch, n)) for n in UNSEEN})

    @property
    def count(self) -> int:
        return len(self.places)

    def note(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame.f_globals.get("__name__", "").split(".")[0] in ("torch", __name__):
            frame = frame.f_back
        self.places.append(f"{what} at {frame.f_code.co_filename}:{frame.f_lineno}")

    def __enter__(self) -> HostReads:
        self._makers.__enter__()
        self._dispatched.__enter__()
        return super().__enter__()

    def __exit__(self, *failed: Any) -> None:
        super().__exit__(*failed)
        self._dispatched.__exit__(*failed)
        self._makers.__exit__(*failed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return device_of(args[0])
        given = list(_tensors_in((args, kwargs)))
        self.on_device = any(device_of(tensor) == DEVICE for tensor in given)
        goes_to = _device_asked_for(func, args, kwargs) or (DEVICE if self.on_device else HOST)
        if self.on_device and (func in COPIES or (func in MOVES and goes_to == HOST)):
            self.note(func.__name__)
        try:
            result = func(*args, **kwargs)
        finally:
            self.on_device = False
        if func in MOVES and result is args[0] and device_of(result) != goes_to:
            result = result.clone()
        if goes_to == HOST:
            for tensor in _tensors_in(result):
                if not any(tensor is one for one in given):
                    tensor.lies_on_host = True
        return result


class _Dispatched(TorchDispatchMode):
    """Counts reads by the operations that a torch function dispatches."""

    supports_higher_order_operators = True

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.reads.on_device and _waits(func, args, kwargs):
            self.reads.note(str(func))
        return func(*args, **kwargs)


def device_of(tensor: torch.Tensor) -> torch.device:
    return HOST if getattr(tensor, "lies_on_host", False) else DEVICE


def _maker(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor: Any = make(*args, **kwargs)
        tensor.lies_on_host = True
        return tensor

    return call


def _device_asked_for(func: Any, args: Any, kwargs: Any) -> torch.device | None:
    if func is torch.Tensor.cpu:
        return HOST
    asked = kwargs.get("device")
    if func is torch.Tensor.to and asked is None:
        asked = kwargs.get("other", args[1] if len(args) > 1 else None)
    if isinstance(asked, torch.Tensor):
        return device_of(asked)
    return torch.device(asked) if isinstance(asked, str | torch.device) else None


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload):
        return False
    if func.overloadpacket in INDEXING:
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors_in(args[1]))
    return any(tag in func.tags for tag in WAITS) and kwargs.get("output_size") is None


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The reference, not counted: it reads lengths on the host, which a GPU kernel does not."""
    with torch._C.DisableTorchFunction():
        return flash_attn_varlen_func(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            seqused_k=seqused_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            kernel="reference",
        )
