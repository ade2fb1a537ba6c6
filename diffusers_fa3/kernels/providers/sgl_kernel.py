"""The FlashAttention-3 binary inside sgl-kernel."""

from __future__ import annotations

import importlib

from diffusers_fa3.kernels.build_flags import FULL_BUILD, version_of
from diffusers_fa3.kernels.contract import Kernel, Provider
from diffusers_fa3.kernels.raw_op import RawOp, find_op


def _load() -> Kernel:
    importlib.import_module("sgl_kernel.flash_attn")
    raw = RawOp(find_op("sgl_kernel"), "sgl_kernel")
    return Kernel("sgl_kernel", version_of("sgl_kernel"), FULL_BUILD, raw.forward, raw.kvcache)


SGL_KERNEL = Provider(
    "sgl_kernel", _load, install="pip install sglang-kernel", modules=("sgl_kernel",)
)
