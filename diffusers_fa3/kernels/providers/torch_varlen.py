"""`torch.nn.attention.varlen`: the FlashAttention-2 inside torch, with nothing to install."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels.adapt import (
    dense_as_packed,
    dense_last_axis,
    empty_rows_minus_inf,
    refuse,
    shielded,
)
from diffusers_fa3.kernels.contract import Kernel, Limits, Provider, Result
from diffusers_fa3.kernels.out import deliver, fits_kernels, needs_grad
from diffusers_fa3.kernels.signature import read_signature
from diffusers_fa3.options import DENSE, Lengths, Options


@dataclass(frozen=True)
class Varlen:
    """The varlen functions of the installed torch. Their arguments differ between versions."""

    function: Callable[..., Any]
    into: Callable[..., Any] | None
    """`varlen_attn_out`, which writes into its first argument; None if torch lacks it."""
    aux: Callable[..., Any]
    """`AuxRequest`, which asks for the log-sum-exp."""

    def forward(
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
        """Packed calls; see `Forward`."""
        names = read_signature(self.function).names
        refuse("torch_varlen", options.beyond("causal", "window"))
        if lengths.seqused_k is not None and "seqused_k" not in names:
            refuse("torch_varlen", ["seqused_k"])
        known = {
            "return_aux": self.aux(lse=True) if return_lse else None,
            "scale": options.softmax_scale,
            "window_size": (options.window[0], 0) if options.causal else options.window,
            "enable_gqa": q.shape[1] != k.shape[1],
            "seqused_k": lengths.seqused_k,
            # One split keeps torch on its flash kernel, whose results do not depend on the batch.
            "num_splits": None if needs_grad(q, k, v) else 1,
        }
        known = {name: value for name, value in known.items() if name in names}
        q, k, v = dense_last_axis(q), dense_last_axis(k), dense_last_axis(v)
        arguments = (q, k, v, *lengths[:4])
        # For one query with grouped heads, FlashAttention-2 fills a reshaped copy instead of `out`.
        decodes = lengths.max_seqlen_q == 1 and q.shape[1] != k.shape[1]
        if out is not None and self.into is not None and fits_kernels(out) and not decodes:
            result = self.into(out, *arguments, **known)
        else:
            result = self.function(*arguments, **known)
        result, lse = result if return_lse else (result, None)
        result = result if out is None else deliver(result, out)
        return result, None if lse is None else empty_rows_minus_inf(lse)


def load() -> Kernel:
    """The functions of the installed torch.

    Raises:
        KernelUnavailableError: torch is too old: its function takes no scale or no window.
    """
    module = importlib.import_module("torch.nn.attention.varlen")
    names = read_signature(module.varlen_attn).names
    if "scale" not in names or "window_size" not in names:
        raise KernelUnavailableError(
            f"torch.nn.attention.varlen takes a scale from torch 2.11 on; got {torch.__version__}"
        )
    into = getattr(module, "varlen_attn_out", None)
    limits = Limits(
        archs=("sm80", "sm90", "sm100", "sm110", "sm120"),
        head_dims_differ=False,
        seqused_k="seqused_k" in names,
        softcap=False,
        backward=True,
        kvcache=False,
    )
    forward = Varlen(module.varlen_attn, into, module.AuxRequest).forward
    return Kernel(
        "torch_varlen",
        torch.__version__,
        limits,
        shielded(dense_as_packed(forward)),
        out="copy" if into is None else "native",
    )


TORCH_VARLEN = Provider(
    "torch_varlen",
    load,
    modules=("torch.nn.attention.varlen",),
    install="pip install 'torch>=2.12'",
)
