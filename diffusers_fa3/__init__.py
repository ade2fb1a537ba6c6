"""FlashAttention-3 variable-length attention for any diffusers model, exact for every mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers_fa3.call import attention
from diffusers_fa3.errors import (
    FA3Error,
    FallbackWarning,
    InputError,
    KernelUnavailableError,
    MaskError,
    ParallelError,
    UnsupportedModelError,
    UnsupportedVersionError,
)
from diffusers_fa3.interface import flash_attn_varlen_func
from diffusers_fa3.interface_kvcache import flash_attn_with_kvcache
from diffusers_fa3.kernels import available_kernels, call_kernel
from diffusers_fa3.lazy import lazily
from diffusers_fa3.masks import PackingPlan, plan_packing

if TYPE_CHECKING:
    from diffusers_fa3.layers import (
        FA3AttnProcessor,
        coverage,
        disable_fa3,
        enable_fa3,
        register,
        unregister,
    )
    from diffusers_fa3.parallel import cp_plan
    from diffusers_fa3.tools.check.check import check_parity

__version__ = "0.1.0"

_TOUCHES_DIFFUSERS = {
    "FA3AttnProcessor": "layers",
    "check_parity": "tools.check.check",
    "coverage": "layers",
    "cp_plan": "parallel",
    "disable_fa3": "layers",
    "enable_fa3": "layers",
    "register": "layers",
    "unregister": "layers",
}
"""Names that import diffusers, and do so when they are first used; and the rooms they are in."""

__all__ = [
    "FA3AttnProcessor",
    "FA3Error",
    "FallbackWarning",
    "InputError",
    "KernelUnavailableError",
    "MaskError",
    "PackingPlan",
    "ParallelError",
    "UnsupportedModelError",
    "UnsupportedVersionError",
    "attention",
    "available_kernels",
    "call_kernel",
    "check_parity",
    "coverage",
    "cp_plan",
    "disable_fa3",
    "enable_fa3",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "plan_packing",
    "register",
    "unregister",
]

__getattr__ = lazily(__name__, _TOUCHES_DIFFUSERS)
