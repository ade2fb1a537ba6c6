"""The raw op `fwd` of every FlashAttention-3 binary, called as its schema says.

Upstream, tokenspeed-fa3, fa3-fwd, sgl-kernel, vLLM and the hub builds all register this op. Its
arguments have the same names and order in all builds, but some builds add or lack a few, and some
give no defaults. So the op is called by position, with every argument given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels.adapt import (
    dense_last_axis,
    refuse,
    without_keys,
    without_padding,
)
from diffusers_fa3.kernels.contract import Forward, Result
from diffusers_fa3.kernels.out import deliver, fits_kernels, needs_grad
from diffusers_fa3.kernels.signature import overload
from diffusers_fa3.options import DENSE, Lengths, Options, is_default

_FILL: dict[str, Any] = {
    **dict.fromkeys(("k_new", "v_new", "q_v", "out")),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new")),
    **dict.fromkeys(("seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k")),
    **dict.fromkeys(("page_table", "kv_batch_idx", "leftpad_k")),
    **dict.fromkeys(("rotary_cos", "rotary_sin", "seqlens_rotary")),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale")),
    "softmax_scale": None,
    "is_causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "attention_chunk": 0,
    "softcap": 0.0,
    "is_rotary_interleaved": True,
    "scheduler_metadata": None,
    # With the op's default, 0, a heuristic splits the keys: results would depend on the batch.
    "num_splits": 1,
    "pack_gqa": None,
    "sm_margin": 0,
    **dict.fromkeys(("sinks", "s_aux", "sparse_mask_fine", "cp_tot_seqused_k")),
    "only_qv": False,
    "cp_world_size": 1,
    "cp_rank": 0,
}
"""The value of each known argument in calls that do not ask for it. The ops' own defaults do not
serve: in one build softmax_scale is 0 by default, which gives uniform attention."""

_SPELLED = ("softmax_scale", "is_causal", "window_size_left", "window_size_right")
"""The op's names for the first three fields of `Options`; the window has two."""

_SAME = [*enumerate(Options._fields)][3:]
"""(place in `Options`, name) of the other fields, for which the op has the same names."""

_NO_OTHERS = Options(1.0)[3:]
"""Their values in most calls, which need not be passed one by one."""

_CACHE_NAMES = {
    "k": "k_new",
    "v": "v_new",
    "qv": "q_v",
    "cache_seqlens": "seqused_k",
    "cache_batch_idx": "kv_batch_idx",
    "cache_leftpad": "leftpad_k",
    "rotary_seqlens": "seqlens_rotary",
    "rotary_interleaved": "is_rotary_interleaved",
    "causal": "is_causal",
}
"""The op's names for arguments of `flash_attn_with_kvcache`, where the two differ."""


_NEEDED = {"out", "num_splits", *_SPELLED, *dict(_SAME).values(), *Lengths._fields}


class RawOp:
    """One raw op, whose schema is read once.

    Raises:
        KernelUnavailableError: `op` is None, lacks an argument that every build has, or has an
            unknown argument without a default.
    """

    def __init__(self, op: Any, name: str) -> None:
        if op is None:
            raise KernelUnavailableError(
                f"{name}: its package registered no op; reinstall it for this torch"
            )
        self._op = overload(op)
        self._name = name
        schema = self._op._schema
        names = [a.name for a in schema.arguments]
        strange = {a.name for a in schema.arguments[3:] if not a.has_default_value()} - _FILL.keys()
        if strange or not {*names} >= _NEEDED:
            raise KernelUnavailableError(
                f"{name}: the op {schema.name} is none that this version knows; "
                f"unknown arguments: {', '.join(sorted(strange)) or 'none'}. "
                "Wrap it in a function with FlashAttention's arguments"
            )
        self._fill = [_FILL.get(a.name, a.default_value) for a in schema.arguments[3:]]
        self._place = {argument: i for i, argument in enumerate(names[3:])}
        self._spelled = [self._place[argument] for argument in _SPELLED]
        self._same = [(option, self._place[argument]) for option, argument in _SAME]
        self._lengths = [self._place[argument] for argument in Lengths._fields]

    def forward(
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
        """See `Forward`."""
        if not (q.numel() and k.numel()):  # as `shielded` does, but at half the cost
            return without_keys(q, k, v, out, return_lse)
        if lengths.seqused_k is not None and not padding_is_safe:
            v = without_padding(v, lengths.seqused_k, lengths.cu_seqlens_k)
        arguments = self._fill.copy()
        scale, causal, left, right = self._spelled
        arguments[scale], arguments[causal] = float(options.softmax_scale), options.causal
        arguments[left], arguments[right] = options.window
        if options[3:] != _NO_OTHERS:
            for option, place in self._same:
                arguments[place] = options[option]
        if lengths is not DENSE:
            for place, value in zip(self._lengths, lengths):
                arguments[place] = value
        return self._call(q, k, v, arguments, out, return_lse)

    def kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        softmax_scale: float,
        window_size: tuple[int, int] = (-1, -1),
        num_splits: int = 0,
        out: Tensor | None = None,
        return_lse: bool = False,
        **options: Any,
    ) -> Result:
        """See `Kernel.kvcache`. With `num_splits` 0, the op may split keys: decoding needs that."""
        asked = {_CACHE_NAMES.get(name, name): value for name, value in options.items()}
        asked |= {"softmax_scale": float(softmax_scale), "num_splits": num_splits}
        asked["window_size_left"], asked["window_size_right"] = window_size
        lacking = asked.keys() - self._place.keys()
        refuse(self._name, (name for name in lacking if not is_default(asked[name])))
        arguments = self._fill.copy()
        for name, value in asked.items():
            if name in self._place:
                arguments[self._place[name]] = value
        return self._call(q, k_cache, v_cache, arguments, out, return_lse)

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        arguments: list[Any],
        out: Tensor | None,
        return_lse: bool,
    ) -> Result:
        if out is not None and fits_kernels(out):
            arguments[self._place["out"]] = out
        if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
            q, k, v = dense_last_axis(q), dense_last_axis(k), dense_last_axis(v)
        members = self._op(q, k, v, *arguments)
        result, lse = members[0], members[1]
        return (result if out is None else deliver(result, out)), lse if return_lse else None


def differentiable(raw: Forward, public: Forward) -> Forward:
    """`public` where autograd records, since raw ops have no backward; else `raw`."""

    def call(
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
        forward = public if needs_grad(q, k, v) else raw
        return forward(
            q,
            k,
            v,
            options,
            lengths,
            padding_is_safe=padding_is_safe,
            out=out,
            return_lse=return_lse,
        )

    return call


def find_op(namespace: str) -> Any | None:
    """`torch.ops.<namespace>.fwd`, or None if no such op is registered. Any namespace exists."""
    return getattr(getattr(torch.ops, namespace), "fwd", None)
