"""FlashAttention-2, the `flash-attn` package: for older GPUs and for features FA3 builds lack."""

from __future__ import annotations

import importlib

from diffusers_fa3.errors import KernelUnavailableError
from diffusers_fa3.kernels.build_flags import version_of
from diffusers_fa3.kernels.contract import Kernel, Limits, Provider
from diffusers_fa3.kernels.public_function import public_forward, public_kvcache

LIMITS = Limits(
    archs=("sm80", "sm90", "sm100", "sm120"),
    head_dim_multiple=1,  # its functions pad the head size
    head_dims_differ=False,
    seqused_k=False,
    backward=True,
)


def _load() -> Kernel:
    functions = importlib.import_module("flash_attn")
    if not hasattr(functions, "flash_attn_varlen_func"):
        raise KernelUnavailableError(
            "flash_attn is here without FlashAttention-2, as flash-attn-4 alone installs it"
        )
    forward = public_forward(functions.flash_attn_varlen_func, functions.flash_attn_func)
    kvcache = public_kvcache(functions.flash_attn_with_kvcache)
    return Kernel("flash_attn_2", version_of("flash_attn"), LIMITS, forward, kvcache, out="copy")


FLASH_ATTN_2 = Provider(
    "flash_attn_2", _load, install="pip install flash-attn", modules=("flash_attn",)
)
