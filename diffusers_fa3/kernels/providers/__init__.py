"""Where kernels come from: one file per package. Only the `load` in it imports the package."""

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
"""In order of preference. One order serves every GPU, since each kernel's limits name the GPUs that
it has code for: FlashAttention-3 on Hopper and Ampere, FlashAttention-4 on Blackwell,
FlashAttention-2 on others. torch's FlashAttention-2 comes before the flash-attn package, which has
softcap but lacks seqused_k and `out`."""

__all__ = ["PROVIDERS"]
