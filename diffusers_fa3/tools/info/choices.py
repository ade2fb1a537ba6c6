"""What "auto" takes on this machine, for the calls that diffusers' models make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels import Request, read_machine, select

HEAD_DIMS = (40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
"""The head sizes of diffusers' models."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Choice:
    """One kind of call, and the kernel that "auto" takes for it."""

    dtype: str
    head_dim: int
    masked: bool
    training: bool
    kernel: str
    """Empty: PyTorch's attention serves."""
    reason: str
    """Why no kernel serves; empty if one does."""


def read_choices(device: torch.device, head_dims: Iterable[int] = HEAD_DIMS) -> tuple[Choice, ...]:
    """The choices for calls on a device. Loads kernels, as a call would."""
    return tuple(
        choose(device, dtype, head_dim, masked=masked, training=training)
        for dtype in DTYPES
        for training in (False, True)
        for masked in (False, True)
        for head_dim in head_dims
    )


def choose(
    device: torch.device, dtype: str, head_dim: int, *, masked: bool, training: bool
) -> Choice:
    """What "auto" takes for one kind of call; the same request as `attention` makes of it."""
    request = Request(DTYPES[dtype], head_dim, head_dim, varlen=masked, backward=training)
    try:
        kernel, reason = select(request, read_machine(device), "auto").name, ""
    except KernelUnavailableError as error:
        kernel, reason = "", error.summary
    return Choice(dtype, head_dim, masked, training, kernel, reason)


def current_device() -> torch.device:
    """The current CUDA device, or the CPU without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
