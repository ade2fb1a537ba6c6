"""The FlashAttention-3 binaries inside serving packages: sgl-kernel's and vLLM's."""

from __future__ import annotations

import importlib
from dataclasses import replace

from diffusers_fa3.providers.adapt import dense_as_packed
from diffusers_fa3.providers.build_flags import FULL_BUILD, version_of
from diffusers_fa3.providers.contract import Kernel, Provider
from diffusers_fa3.providers.raw_op import RawOp, find_op


def _load_sgl() -> Kernel:
    importlib.import_module("sgl_kernel.flash_attn")
    raw = RawOp(find_op("sgl_kernel"), "sgl_kernel")
    return Kernel("sgl_kernel", version_of("sgl_kernel"), FULL_BUILD, raw.forward, raw.kvcache)


def _load_vllm() -> Kernel:
    importlib.import_module("vllm.vllm_flash_attn")
    raw = RawOp(find_op("_vllm_fa3_C"), "vllm")
    # "This flash attention build only supports varlen (for build size reasons)."
    forward = dense_as_packed(raw.forward)
    limits = replace(FULL_BUILD, archs=("sm90a",), kvcache=False)
    return Kernel("vllm", version_of("vllm"), limits, forward)


SGL_KERNEL = Provider(
    "sgl_kernel", _load_sgl, install="pip install sglang-kernel", modules=("sgl_kernel",)
)
VLLM = Provider(
    "vllm",
    _load_vllm,
    install="pip install vllm",
    modules=("vllm",),
    on_request="importing vllm is slow and changes the process",
)
