"""FlashAttention-3's module `flash_attn_interface`: built from upstream, or from tokenspeed-fa3."""

from __future__ import annotations

import importlib
from dataclasses import replace

from diffusers_fa3.kernels.build_flags import (
    backward_is_built,
    limits_from,
    read_flags,
    version_of,
)
from diffusers_fa3.kernels.contract import Kernel, Provider
from diffusers_fa3.kernels.public_function import (
    limits_of,
    public_forward,
    public_kvcache,
)
from diffusers_fa3.kernels.raw_op import RawOp, differentiable, find_op
from diffusers_fa3.kernels.signature import read_signature


def _load() -> Kernel:
    functions = importlib.import_module("flash_attn_interface")
    flags = read_flags("flash_attn_config")
    version = version_of("flash_attn_interface")
    limits = replace(limits_from(flags), backward=backward_is_built(flags))
    public = public_forward(functions.flash_attn_varlen_func, functions.flash_attn_func)

    op = find_op("flash_attn_3")
    if op is None:  # older builds register no raw op with torch
        asked = limits_of(read_signature(functions.flash_attn_varlen_func))
        limits = replace(limits, window=asked.window, softcap=asked.softcap)
        kvcache = public_kvcache(functions.flash_attn_with_kvcache)
        return Kernel("flash_attn_3", version, limits, public, kvcache, out="copy")
    raw = RawOp(op, "flash_attn_3")
    forward = differentiable(raw.forward, public) if limits.backward else raw.forward
    return Kernel("flash_attn_3", version, limits, forward, raw.kvcache)


FLASH_ATTN_3 = Provider(
    "flash_attn_3",
    _load,
    install="pip install tokenspeed-fa3",
    modules=("flash_attn_interface",),
)
