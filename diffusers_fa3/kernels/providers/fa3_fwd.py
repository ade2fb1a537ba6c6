"""FlashAttention-3 from the package fa3-fwd: forward only, built without float16 and window."""

from __future__ import annotations

import importlib

from diffusers_fa3.kernels.build_flags import limits_from, read_flags, version_of
from diffusers_fa3.kernels.contract import Kernel, Provider
from diffusers_fa3.kernels.raw_op import RawOp, find_op


def _load() -> Kernel:
    importlib.import_module("fa3_fwd_interface")
    raw = RawOp(find_op("fa3_fwd"), "fa3_fwd")
    limits = limits_from(read_flags("fa3_fwd_config"))
    return Kernel("fa3_fwd", version_of("fa3_fwd_interface"), limits, raw.forward, raw.kvcache)


FA3_FWD = Provider("fa3_fwd", _load, install="pip install fa3-fwd", modules=("fa3_fwd_interface",))
