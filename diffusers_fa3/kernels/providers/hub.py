"""FlashAttention-3 from the Hugging Face hub, at a pinned version."""

from __future__ import annotations

import importlib

from diffusers_fa3.kernels.build_flags import limits_from, read_flags
from diffusers_fa3.kernels.contract import Kernel, Provider
from diffusers_fa3.kernels.raw_op import RawOp

REPOSITORY = "kernels-community/flash-attn3"
VERSION = 1


def _load() -> Kernel:
    build = importlib.import_module("kernels").get_kernel(REPOSITORY, version=VERSION)
    # The op's namespace ends in a hash of the build; the build's own module knows it.
    raw = RawOp(build.flash_attn_interface.flash_attn_3_cuda.fwd, "hub")
    limits = limits_from(read_flags(f"{build.__name__}.flash_attn_config"))
    return Kernel("hub", f"{REPOSITORY} v{VERSION}", limits, raw.forward, raw.kvcache)


HUB = Provider(
    "hub",
    _load,
    install="pip install 'kernels>=0.17.2'",
    modules=("kernels",),
    on_request="it downloads a binary and runs it",
)
