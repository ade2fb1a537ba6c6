"""Where kernels come from, one file for each package, imported by nothing but its own loader."""

from __future__ import annotations

from diffusers_fa3.kernels.providers.fa3_fwd import FA3_FWD
from diffusers_fa3.kernels.providers.flash_attn_2 import FLASH_ATTN_2
from diffusers_fa3.kernels.providers.flash_attn_3 import FLASH_ATTN_3
from diffusers_fa3.kernels.providers.flash_attn_4 import FLASH_ATTN_4
from diffusers_fa3.kernels.providers.hub import HUB
from diffusers_fa3.kernels.providers.reference import REFERENCE
from diffusers_fa3.kernels.providers.sgl_kernel import SGL_KERNEL
from diffusers_fa3.kernels.providers.torch_varlen import TORCH_VARLEN
from diffusers_fa3.kernels.providers.vllm import VLLM

PROVIDERS = (
    FLASH_ATTN_3,
    FA3_FWD,
    SGL_KERNEL,
    VLLM,
    HUB,
    FLASH_ATTN_4,
    TORCH_VARLEN,
    FLASH_ATTN_2,
    REFERENCE,
)
"""In order of preference. One order serves every GPU, since binaries name the ones they have code
for: FlashAttention-3 on Hopper and Ampere, -4 on Blackwell, and on what is left -2 as torch has it,
before the package, which lacks seqused_k and `out` but has softcap."""

__all__ = ["PROVIDERS"]
