"""The FlashAttention-3 binary inside vLLM."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

from diffusers_fa3.kernels.adapt import dense_as_packed, shielded
from diffusers_fa3.kernels.build_flags import FULL_BUILD, version_of
from diffusers_fa3.kernels.contract import Kernel, Provider
from diffusers_fa3.kernels.raw_op import RawOp, find_op


def _load() -> Kernel:
    importlib.import_module("vllm.vllm_flash_attn")
    raw = RawOp(find_op("_vllm_fa3_C"), "vllm")
    # vLLM says: "This flash attention build only supports varlen (for build size reasons)."
    forward = shielded(dense_as_packed(partial(raw.forward, padding_is_safe=True)))
    limits = replace(FULL_BUILD, archs=("sm90a",), kvcache=False)
    return Kernel("vllm", version_of("vllm"), limits, forward)


VLLM = Provider(
    "vllm",
    _load,
    install="pip install vllm",
    modules=("vllm",),
    on_request="importing vllm is slow and changes the process",
)
