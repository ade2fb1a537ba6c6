"""What a kernel can do, what a call asks, what the machine is, and whether the three fit.

`rejection_reasons` is a pure function of three frozen records. So tests on any machine can check
the choice that is made on an H100, on an A100, or without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusers_fa3.options import DENSE, Lengths, Options

HALF = frozenset({torch.float16, torch.bfloat16})
FLOAT8 = frozenset({torch.float8_e4m3fn})


class Machine(NamedTuple):
    """Where a call runs. `read_machine` reads it; tests make it up."""

    device: str
    """Device type: "cpu", "cuda", ..."""
    capability: tuple[int, int] | None
    """Compute capability, e.g. (9, 0) for H100; None where there is no CUDA device."""


@cache
def read_machine(device: torch.device) -> Machine:
    """The `Machine` of a tensor's device. No other function asks torch for these facts.

    Cached: the facts do not change, and asking in every attention call would be slow.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return Machine(device.type, None)
    return Machine("cuda", torch.cuda.get_device_capability(device))


class Request(NamedTuple):
    """What one attention call asks of a kernel. A tuple, since tuples are fast to make and hash."""

    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    varlen: bool = True
    """Packed (T, H, D) tensors with cu_seqlens; False: dense (B, S, H, D)."""
    seqused_k: bool = False
    window: bool = False
    softcap: bool = False
    lse: bool = False
    backward: bool = False
    kvcache: bool = False
    page_table: bool = False
    functional: bool = False
    """q, k or v has a forward-mode derivative, or is in a transform of torch.func."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a kernel build can serve."""

    archs: tuple[str, ...]
    """GPU architectures in the binary: "sm80", "sm86", "sm90a", ...; "any" also runs on a CPU."""
    dtypes: frozenset[torch.dtype] = HALF
    max_head_dim: int = 256
    head_dim_multiple: int = 8
    head_dims_differ: bool = True
    """Whether v may have another head size than q and k."""
    dense: bool = True
    varlen: bool = True
    seqused_k: bool = True
    window: bool = True
    softcap: bool = True
    lse: bool = True
    backward: bool = False
    kvcache: bool = True
    page_table: bool = True
    reads_padding: bool = True
    """Whether the kernel multiplies values beyond `seqused_k` by 0 instead of skipping them. If so,
    NaN and inf there would reach the output."""
    functional: bool = False
    """Whether forward-mode derivatives and torch.func's transforms go through it. Raw ops drop the
    derivative without a word."""
    seqused_k_backward: bool = False
    """Whether seqused_k may be given where gradients are needed."""


def rejection_reasons(limits: Limits, machine: Machine, request: Request | None) -> list[str]:
    """Every reason why a kernel with these limits cannot serve; an empty list means that it can.

    If `request` is None, only the machine is checked.
    """
    reasons = []
    if not _has_code_for(limits.archs, machine):
        reasons.append(f"has code for {', '.join(limits.archs)}; this is {device_words(machine)}")
    if request is None:
        return reasons

    if request.dtype not in limits.dtypes:
        served = ", ".join(sorted(str(d).removeprefix("torch.") for d in limits.dtypes))
        reasons.append(f"serves {served}; got {str(request.dtype).removeprefix('torch.')}")
    multiple = 16 if request.dtype in FLOAT8 else limits.head_dim_multiple
    for head_dim in sorted({request.head_dim, request.head_dim_v}):
        if head_dim > limits.max_head_dim or head_dim % multiple:
            reasons.append(
                f"serves head sizes that are multiples of {multiple} up to {limits.max_head_dim}; "
                f"got {head_dim}"
            )
    if request.head_dim != request.head_dim_v and not limits.head_dims_differ:
        reasons.append(
            f"needs one head size; got {request.head_dim} for q and k, {request.head_dim_v} for v"
        )
    wanted = {
        "dense": (not request.varlen and not request.kvcache, limits.dense),
        "varlen": (request.varlen, limits.varlen),
        "seqused_k": (request.seqused_k, limits.seqused_k),
        "window": (request.window, limits.window),
        "softcap": (request.softcap, limits.softcap),
        "lse": (request.lse, limits.lse),
        "backward": (request.backward, limits.backward),
        "kvcache": (request.kvcache, limits.kvcache),
        "page_table": (request.page_table, limits.page_table),
    }
    reasons += [
        f"built without {name}" for name, (asked, has) in wanted.items() if asked and not has
    ]
    if request.functional and not limits.functional:
        reasons.append("has no forward-mode derivative, nor is it known to torch.func")
    if request.backward and request.seqused_k and limits.backward and limits.seqused_k:
        reasons += [] if limits.seqused_k_backward else ["no backward with seqused_k"]
    return reasons


def _has_code_for(archs: tuple[str, ...], machine: Machine) -> bool:
    """Whether a binary runs here: "smXY" code on X.Y and later minors of X, "smXYa" code on X.Y."""
    if "any" in archs:
        return True
    if machine.capability is None:
        return False
    major, minor = machine.capability
    for arch in archs:
        digits = arch.removeprefix("sm").removesuffix("a")
        arch_major, arch_minor = int(digits[:-1]), int(digits[-1])
        exact = arch.endswith("a")
        if major == arch_major and (minor == arch_minor if exact else minor >= arch_minor):
            return True
    return False


def device_words(machine: Machine) -> str:
    """The machine in words, for the end of a sentence."""
    if machine.capability is None:
        return f"a {machine.device} device"
    return "a {} device of compute capability {}.{}".format(machine.device, *machine.capability)


Result = tuple[Tensor, Tensor | None]
"""Output, and the log-sum-exp or None."""


class Forward(Protocol):
    """The calling convention of every kernel.

    Takes packed q (Tq, H, D), k (Tk, Hk, D), v (Tk, Hk, Dv) with `cu_seqlens` in `lengths`; or
    dense q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) without. `padding_is_safe`: the
    caller guarantees that padding in v has no NaN or inf, except where it repeats a valid key's.
    Returns (out, lse): out has q's shape with v's head size; lse is fp32, natural log, (H, Tq)
    packed or (B, H, Sq) dense, or None if not asked for. Rows without a valid key are 0, with an
    lse of -inf.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        lengths: Lengths = DENSE,
        *,
        padding_is_safe: bool = False,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Result:
        """Attention of q over k and v."""
        ...


class InnerForward(Protocol):
    """`Forward` for calls with at least one query and one key, and with safe padding in v."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        lengths: Lengths = DENSE,
        *,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Result:
        """Attention of q over k and v."""
        ...


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel: what it can do, and the functions that call it."""

    name: str
    version: str
    limits: Limits
    forward: Forward
    kvcache: Callable[..., Result] | None = None
    """Takes q, k_cache, v_cache, and by keyword the other arguments of FlashAttention's
    `flash_attn_with_kvcache`, `out` and `return_lse`. None: the kernel has no such function."""
    out: Literal["native", "copy"] = "native"
    """"native": the kernel writes into the caller's `out`; "copy": its result is copied there."""

    @property
    def seqused_k(self) -> bool:
        """Whether the kernel takes `seqused_k`, the number of valid keys of each sample."""
        return self.limits.seqused_k

    @property
    def reads_padding(self) -> bool:
        """Whether NaN or inf in v beyond `seqused_k` would reach the output."""
        return self.limits.reads_padding


@dataclass(frozen=True)
class Provider:
    """A package that a kernel may come from. Only `load` imports the package."""

    name: str
    load: Callable[[], Kernel]
    install: str
    """The command that installs the package."""
    modules: tuple[str, ...] = field(default=())
    """Modules that must be installed before `load` is tried; empty if torch is enough."""
    on_request: str = ""
    """Why this kernel is loaded only if asked for by name; empty if "auto" may load and take it."""
    cuda: bool = True
    """Whether it needs a CUDA device. Without one, it is loaded only if asked for by name."""
