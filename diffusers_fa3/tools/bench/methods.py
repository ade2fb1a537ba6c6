"""The methods that are compared on an attention call, and probes of what each method does.

diffusers' functions run unchanged, except that they call the same kernel as this package. So
methods differ only in how they pack.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from diffusers_fa3.call import attention
from diffusers_fa3.interface import flash_attn_varlen_func
from diffusers_fa3.kernels import Kernel, Request, read_machine, select
from diffusers_fa3.masks import PackingPlan
from diffusers_fa3.options import Options
from diffusers_fa3.tools.bench.cases import Inputs

Run = Callable[[Any], Any]

dispatch: Any = attention_dispatch

BACKENDS = {
    "cudnn": "cudnn",
    "flash_attention_for_cpu": "flash_for_cpu",
    "flash_fwd": "flash",
    "scaled_dot_product_flash": "flash",
    "fmha": "efficient",
    "scaled_dot_product_efficient": "efficient",
    "attention_math": "math",
}
"""Part of the name of a kernel or PyTorch operation -> backend. The first match counts."""


@dataclass(frozen=True)
class Method:
    """One way to compute an attention call."""

    run: Run
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """The context that it runs in, entered before the clock starts."""


def methods(
    plan: PackingPlan, without_pads: PackingPlan | None, packed: PackingPlan, kernel: str
) -> dict[str, Method]:
    """All methods, by name. The results of the others are compared with the first method's.

    Args:
        plan: the plan of the inputs' mask.
        without_pads: the plan that also leaves padded tokens out as queries; None if the call has
            no padded queries.
        packed: the plan by which `Inputs.packed` was made.
        kernel: a name from `available_kernels()`.
    """

    def sdpa(x: Inputs) -> Tensor:
        out = F.scaled_dot_product_attention(*x.heads_first, attn_mask=x.mask)
        return out.transpose(1, 2)

    def ours(x: Inputs, mask: Tensor | PackingPlan | None) -> Any:
        q, k, v = x.qkv
        return attention(q, k, v, mask, kernel=kernel)

    def bare(x: Inputs) -> Any:
        assert packed.cu_seqlens_q is not None
        assert packed.cu_seqlens_k is not None
        return flash_attn_varlen_func(
            *x.packed,
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_k=packed.cu_seqlens_k,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_k=packed.max_seqlen_k,
            causal=packed.causal,
            window_size=packed.window,
            kernel=kernel,
        )

    queries_packed = (
        {} if without_pads is None else {"ours+q": Method(lambda x: ours(x, without_pads))}
    )
    return {
        "default": Method(sdpa),
        "cudnn": Method(sdpa, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
        "_flash_3": Method(lambda x: dispatch._flash_attention_3(*x.qkv, x.mask)),
        "_flash_varlen_3": Method(lambda x: dispatch._flash_varlen_attention_3(*x.qkv, x.mask)),
        "_flash_3_varlen_hub": Method(
            lambda x: dispatch._flash_attention_3_varlen_hub(*x.qkv, x.mask)
        ),
        "ours": Method(lambda x: ours(x, plan)),
        **queries_packed,
        "ours+plan": Method(lambda x: ours(x, x.mask)),
        "bare": Method(bare),
    }


@contextmanager
def diffusers_on(kernel: str) -> Iterator[None]:
    """Make diffusers' FlashAttention-3 functions call `kernel` within the context."""

    def dense(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, **options: object
    ) -> tuple[Tensor, Tensor | None]:
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return chosen(q, lse=True).forward(q, k, v, Options(scale), return_lse=True)

    def dense_on_cpu(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
        # No log-sum-exp: a GPU kernel returns it at no cost, the reference does not.
        out, _ = chosen(q, lse=False).forward(q, k, v, Options(q.shape[-1] ** -0.5))
        return out, out.new_empty(0)

    def chosen(q: Tensor, lse: bool) -> Kernel:
        request = Request(dtype=q.dtype, head_dim=q.shape[-1], head_dim_v=q.shape[-1], lse=lse)
        return select(request, read_machine(q.device), kernel)

    varlen = partial(flash_attn_varlen_func, kernel=kernel)
    hub = dispatch._HUB_KERNELS_REGISTRY[dispatch.AttentionBackendName._FLASH_3_VARLEN_HUB]
    names = ("flash_attn_3_func", "flash_attn_3_varlen_func")
    before = [*(getattr(dispatch, name) for name in names), hub.kernel_fn]
    # diffusers registers its dense function for CUDA only.
    dispatch._wrapped_flash_attn_3.register_kernel("cpu")(dense_on_cpu)
    dispatch.flash_attn_3_func = dense
    dispatch.flash_attn_3_varlen_func = hub.kernel_fn = varlen
    try:
        yield
    finally:
        dispatch.flash_attn_3_func, dispatch.flash_attn_3_varlen_func, hub.kernel_fn = before


def attempt(method: Method, inputs: Inputs) -> Tensor | str:
    """The method's result, or the reason why the method refuses the call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with method.around():
                result: Tensor = method.run(inputs)
                return result
        except (RuntimeError, ValueError) as error:
            words = [
                f"{type(error).__name__}: {error}",
                *(str(warning.message) for warning in caught),
            ]
    return "; ".join(text.split(" (Triggered")[0].splitlines()[0] for text in words)


def sdpa_backend(method: Method, inputs: Inputs, device: str) -> tuple[str, str]:
    """The backend that PyTorch picked, and its longest kernel, read from a profile."""
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with without_stderr(), profile(activities=kinds) as trace, method.around():
        method.run(inputs)
        if device == "cuda":
            torch.cuda.synchronize()
    events = trace.events()
    kernels = [e for e in events if e.device_type != DeviceType.CPU]
    longest = max(kernels, key=lambda e: e.time_range.elapsed_us()).name if kernels else ""
    return backend_in([longest, *(e.name for e in events)]), longest


def backend_in(names: list[str]) -> str:
    """The backend, recognised by the names of kernels and operations."""
    found = [word for part, word in BACKENDS.items() if any(part in name for name in names)]
    return found[0] if found else "unknown"


def host_syncs(method: Method, inputs: Inputs) -> int:
    """How often one call makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught, method.around():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            method.run(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def peak_bytes(method: Method, inputs: Inputs, device: str) -> int:
    """The peak memory of a call, in bytes, without its inputs."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with method.around():
            method.run(inputs)
        return torch.cuda.max_memory_allocated() - before
    with (
        without_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace,
        method.around(),
    ):
        method.run(inputs)
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    changes = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes), default=0)


@contextmanager
def without_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2: the profiler of some builds prints there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
