"""FlashAttention-4, the `flash-attn-4` package: compiles at the first call; meant for Blackwell."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels.adapt import dense_last_axis, refuse, shielded
from diffusers_fa3.kernels.build_flags import version_of
from diffusers_fa3.kernels.contract import Forward, Kernel, Limits, Provider, Result
from diffusers_fa3.kernels.out import invoke, needs_grad
from diffusers_fa3.kernels.signature import read_signature
from diffusers_fa3.options import DENSE, Lengths, Options

LIMITS = Limits(
    archs=("sm90a", "sm100", "sm110", "sm120"), max_head_dim=128, backward=True, kvcache=False
)


def bind(
    private: Callable[..., Any] | None,
    varlen: Callable[..., Any],
    dense: Callable[..., Any],
) -> Forward:
    """`Forward` over FlashAttention-4's private forward and its public functions.

    The private forward takes `out`; the public functions have a backward. All arguments but q, k
    and v go by name, since their order changes between releases.
    """
    takes_out = private is not None and "out" in read_signature(private).names

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        lengths: Lengths = DENSE,
        *,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Result:
        refuse("flash_attn_4", options.beyond("causal", "window", "softcap"))
        arguments: dict[str, Any] = {
            name: value for name, value in zip(lengths._fields, lengths) if value is not None
        }
        if lengths.cu_seqlens_q is None:
            arguments.pop("max_seqlen_q", None)
            arguments.pop("max_seqlen_k", None)
        arguments |= {"softmax_scale": options.softmax_scale, "return_lse": return_lse}
        arguments |= {"causal": options.causal, "softcap": options.softcap}
        left, right = (None if keys < 0 else keys for keys in options.window)
        if takes_out and not needs_grad(q, k, v):
            assert private is not None
            function = private
            arguments |= {"window_size_left": left, "window_size_right": right}
        else:
            packed = lengths.cu_seqlens_q is not None or lengths.seqused_k is not None
            function = varlen if packed else dense
            arguments["window_size"] = (left, right)
        # Releases without this argument always return the log-sum-exp.
        if "return_lse" not in read_signature(function).names:
            del arguments["return_lse"]
        q, k, v = dense_last_axis(q), dense_last_axis(k), dense_last_axis(v)
        result, lse, *_ = invoke(function, q, k, v, out=out, **arguments)
        if return_lse and lse is None:
            raise KernelUnavailableError(
                "flash_attn_4 returned no log-sum-exp, though asked; call without, or say "
                'kernel="auto"'
            )
        return result, lse if return_lse else None

    return shielded(call)


def _load() -> Kernel:
    if find_spec("flash_attn.cute") is None:
        raise KernelUnavailableError(
            "flash_attn is here without FlashAttention-4, as flash-attn alone installs it"
        )
    functions = importlib.import_module("flash_attn.cute")
    interface = importlib.import_module("flash_attn.cute.interface")
    private = getattr(interface, "_flash_attn_fwd", None)
    native = private is not None and "out" in read_signature(private).names
    forward = bind(private, functions.flash_attn_varlen_func, functions.flash_attn_func)
    return Kernel(
        "flash_attn_4",
        version_of("flash_attn"),
        LIMITS,
        forward,
        out="native" if native else "copy",
    )


FLASH_ATTN_4 = Provider(
    "flash_attn_4", _load, install="pip install flash-attn-4", modules=("flash_attn",)
)
