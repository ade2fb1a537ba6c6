"""Any function with FlashAttention's arguments as a kernel, called as its signature says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels.adapt import (
    dense_as_packed,
    empty_rows_minus_inf,
    refuse,
    shielded,
)
from diffusers_fa3.kernels.contract import (
    FLOAT8,
    HALF,
    Forward,
    InnerForward,
    Kernel,
    Limits,
    Result,
)
from diffusers_fa3.kernels.out import has_tangent, invoke, name_of, needs_grad
from diffusers_fa3.kernels.raw_op import RawOp
from diffusers_fa3.kernels.signature import Signature, is_raw_op, read_signature
from diffusers_fa3.options import DENSE, Lengths, Options, is_default

_SPELLINGS = {
    "causal": ("causal", "is_causal"),
    "window": ("window_size", "window"),
    "softmax_scale": ("softmax_scale", "scale"),
}
"""The names that functions have for our arguments; FlashAttention's name comes first."""

_PRESET = {"num_splits": 1, "fa_version": 3}
"""Arguments that every call gives, if the function has them. By default, some functions split the
keys by a heuristic, and vLLM's function runs FlashAttention-2."""

_NOTHING = {"seqused_q": None, "seqused_k": None, "causal": False, "is_causal": False}
"""Values for arguments that a function requires, in calls that do not ask for them."""

_EVERY_FLOAT = HALF | FLOAT8 | {torch.float32, torch.float64}


def public_forward(
    varlen: Callable[..., Any] | None, dense: Callable[..., Any] | None = None
) -> Forward:
    """`Forward` over a build's public functions for packed and for dense tensors.

    Without `dense`, dense calls go to `varlen` as packed calls. One of the two must be given.
    """
    if varlen is None:
        assert dense is not None
        return shielded(_forward(dense))
    by_varlen = dense_as_packed(_forward(varlen))
    if dense is None:
        return shielded(by_varlen)
    by_dense = _forward(dense)

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
        # Only varlen functions have the argument seqused_k.
        packed = lengths.cu_seqlens_q is not None or lengths.seqused_k is not None
        forward = by_varlen if packed else by_dense
        return forward(q, k, v, options, lengths, out=out, return_lse=return_lse)

    return shielded(call)


def _forward(function: Callable[..., Any]) -> InnerForward:
    signature = read_signature(function)
    name = name_of(function)
    names = {*signature.names}
    spelling = {
        ours: next((s for s in theirs if s in names), theirs[0])
        for ours, theirs in _SPELLINGS.items()
    }
    takes_scale = signature.any_name or spelling["softmax_scale"] in names
    takes_bounds = signature.any_name or "max_seqlen_q" in names
    preset: dict[str, Any] = {
        argument: value for argument, value in _PRESET.items() if argument in names
    }
    preset |= {
        argument: _NOTHING[argument] for argument in signature.required if argument in _NOTHING
    }

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
        asked = {spelling.get(ours, ours): value for ours, value in options.beyond().items()}
        # A function without a scale argument uses D ** -0.5, as all kernels do by default.
        if takes_scale or options.softmax_scale != q.shape[-1] ** -0.5:
            asked[spelling["softmax_scale"]] = options.softmax_scale
        if lengths is not DENSE:
            asked |= {n: x for n, x in zip(Lengths._fields, lengths) if x is not None}
            if not takes_bounds or lengths.cu_seqlens_q is None:  # only bounds: safe to drop
                asked.pop("max_seqlen_q", None)
                asked.pop("max_seqlen_k", None)
        known = preset | asked
        if not (signature.any_name or known.keys() <= names):
            refuse(name, (n for n in known if n not in names))
        if return_lse and signature.lse_switch is not None:
            known[signature.lse_switch] = True

        result, lse = _members(name, invoke(function, q, k, v, out=out, **known), return_lse)
        if needs_grad(q, k, v) and not result.requires_grad:
            raise KernelUnavailableError(
                f"{name} returned a result without gradient, for inputs that need one; call under "
                "torch.no_grad(), or take a kernel with a backward"
            )
        if has_tangent(q, k, v) and not has_tangent(result):
            raise KernelUnavailableError(
                f"{name} returned a result without forward derivative, for inputs that have one; "
                'say kernel="reference", which has it'
            )
        return result, lse

    return call


def public_kvcache(function: Callable[..., Any]) -> Callable[..., Result]:
    """`Kernel.kvcache` over a build's own `flash_attn_with_kvcache`."""
    signature = read_signature(function)
    name = name_of(function)

    def call(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        out: Tensor | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Result:
        if "page_table" in options and "page_table" not in signature.names:
            options["block_table"] = options.pop("page_table")  # FlashAttention-2's name for it
        if not signature.any_name:
            unknown = (n for n in options if n not in signature.names)
            refuse(name, (n for n in unknown if not is_default(options[n])))
        if return_lse and signature.lse_switch is not None:
            options[signature.lse_switch] = True
        result = invoke(function, q, k_cache, v_cache, out=out, **options)
        return _members(name, result, return_lse)

    return call


def _members(name: str, result: Any, return_lse: bool) -> Result:
    """Output and log-sum-exp from a function's result: a tensor, or a tuple of any length."""
    members = result if isinstance(result, (tuple, list)) else (result,)
    if not return_lse:
        return members[0], None
    if len(members) < 2 or not isinstance(members[1], Tensor):
        raise KernelUnavailableError(
            f"{name} returned no log-sum-exp, but {len(members)} results; it is the second of "
            "them. Call without `return_lse`, or take another kernel"
        )
    return members[0], empty_rows_minus_inf(members[1])


def limits_of(signature: Signature) -> Limits:
    """The limits that a function's arguments imply. Dtypes and head sizes are not limited."""

    def has(*names: str) -> bool:
        return signature.any_name or any(name in signature.names for name in names)

    kvcache = "k_cache" in signature.names
    varlen = has("cu_seqlens_q") and not kvcache
    return Limits(
        archs=("any",),
        dtypes=_EVERY_FLOAT,
        max_head_dim=2**31,
        head_dim_multiple=1,
        dense=not kvcache,
        varlen=varlen,
        # vLLM's function reads seqused_k only with a block_table.
        seqused_k=varlen and has("seqused_k") and "block_table" not in signature.names,
        window=has(*_SPELLINGS["window"]),
        softcap=has("softcap"),
        backward=not kvcache,
        kvcache=kvcache,
        functional=not kvcache,
    )


def wrap_callable(function: Callable[..., Any]) -> Kernel:
    """A user's function or raw op as a kernel.

    Raises:
        KernelUnavailableError: `function` requires arguments that FlashAttention's functions do not
            have, or is a raw op that `RawOp` does not know.
    """
    name = name_of(function)
    if is_raw_op(function):
        op = RawOp(function, name)
        limits = Limits(("any",), HALF | FLOAT8, head_dims_differ=True)
        return Kernel(name, "", limits, op.forward, op.kvcache)
    signature = read_signature(function)
    strange = {*signature.required} - {*signature.positional[:3]} - _GIVEN
    if strange:
        raise KernelUnavailableError(
            f"{name} requires {', '.join(sorted(strange))}; "
            "a function that is given as `kernel` takes FlashAttention's arguments. Give the "
            "others defaults, or bind them by functools.partial"
        )
    limits = limits_of(signature)
    forward = public_forward(function) if limits.varlen else public_forward(None, function)
    kvcache = public_kvcache(function) if limits.kvcache else None
    out: Literal["native", "copy"] = "native" if "out" in signature.names else "copy"
    return Kernel(name, "", limits, forward, kvcache, out=out)


_GIVEN = {
    *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k"),
    *("softmax_scale", "scale", "causal", "is_causal"),
}
"""Arguments that a function may require, besides its first three (q, k and v)."""
