"""What a kernel can do, what a call asks, what the machine is: facts, and the decision over them.

`rejection_reasons` is a pure function of three frozen records, so every choice that the package
makes on an H100, an A100 or no GPU at all is tested on any machine, with given facts.
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
    """Where a call runs; read by `read_machine`, made up by tests."""

    device: str
    """Device type: "cpu", "cuda", ..."""
    capability: tuple[int, int] | None
    """Compute capability, e.g. (9, 0) for H100; None where there is no CUDA device."""


@cache
def read_machine(device: torch.device) -> Machine:
    """The facts of the machine behind a tensor's device: the only place that asks for them.

    A device does not change: asked once, since an attention call cannot wait for the answer.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return Machine(device.type, None)
    return Machine("cuda", torch.cuda.get_device_capability(device))


class Request(NamedTuple):
    """What one attention call asks of a kernel. A tuple, which is made and hashed fast."""

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


@dataclass(frozen=True, slots=True)
class Limits:
    """What a kernel build can serve."""

    archs: tuple[str, ...]
    """Machine code in the binary: "sm80", "sm86", "sm90a", ...; "any" needs no GPU."""
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
    reads_padding: bool = True
    """Whether it weighs values behind a sample's `seqused_k` by 0, instead of leaving them out."""
    seqused_k_backward: bool = False
    """Whether seqused_k may be given where gradients are needed."""


def rejection_reasons(limits: Limits, machine: Machine, request: Request | None) -> list[str]:
    """Every reason why a kernel of these limits cannot serve; an empty list means that it can.

    Without a request only the machine is judged.
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
    }
    reasons += [
        f"built without {name}" for name, (asked, has) in wanted.items() if asked and not has
    ]
    if request.backward and request.seqused_k and limits.backward and limits.seqused_k:
        reasons += [] if limits.seqused_k_backward else ["no backward with seqused_k"]
    return reasons


def _has_code_for(archs: tuple[str, ...], machine: Machine) -> bool:
    """Machine code runs on its own major version, from its minor on; "a" code on its own only."""
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
    """The machine in words, to end a sentence with."""
    if machine.capability is None:
        return f"a {machine.device} device"
    return "a {} device of compute capability {}.{}".format(machine.device, *machine.capability)


Result = tuple[Tensor, Tensor | None]
"""Output and log-sum-exp."""


class Forward(Protocol):
    """One calling convention for every kernel.

    Packed q (Tq, H, D), k (Tk, Hk, D), v (Tk, Hk, Dv) with `cu_seqlens` in `lengths`; or dense
    q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) without. `padding_is_safe` says that v has
    no NaN nor inf behind a sample's valid keys that valid keys do not have.
    Returns (out, lse): out like q with v's head size, lse fp32, natural log, (H, Tq) packed or
    (B, H, Sq) dense, None unless asked for. Rows without a valid key are 0, their lse is -inf.
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
    """`Forward` of calls that have a query and a key, and values of padding that are safe."""

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
    """A loaded kernel, bound once: what it can do, and how it is called."""

    name: str
    version: str
    limits: Limits
    forward: Forward
    kvcache: Callable[..., Result] | None = None
    """FlashAttention's `flash_attn_with_kvcache` arguments by keyword, plus out and return_lse."""
    out: Literal["native", "copy"] = "native"
    """"native": the kernel writes into the caller's `out`; "copy": its result is copied there."""

    @property
    def seqused_k(self) -> bool:
        """Whether it takes a number of valid keys for each sample."""
        return self.limits.seqused_k

    @property
    def reads_padding(self) -> bool:
        """Whether NaN behind these keys, in v, would reach the output."""
        return self.limits.reads_padding


@dataclass(frozen=True)
class Provider:
    """Where a kernel may come from. `load` imports the package; nothing else does."""

    name: str
    load: Callable[[], Kernel]
    install: str
    """What to type to get it."""
    modules: tuple[str, ...] = field(default=())
    """Modules that must be found before `load` is tried; none for what needs no other package."""
    on_request: str = ""
    """Why "auto" never takes it, and nothing loads it unasked; empty where it may."""
    cuda: bool = True
    """Whether it needs a CUDA device: without one it is not loaded at all."""
