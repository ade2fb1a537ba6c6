"""Where kernels come from, and which one serves a call. Importing this imports no kernel."""

from __future__ import annotations

import torch

from diffusers_fa3.providers.contract import (
    Kernel,
    Limits,
    Machine,
    Provider,
    Request,
    read_machine,
    rejection_reasons,
)
from diffusers_fa3.providers.flash_attn_2 import FLASH_ATTN_2
from diffusers_fa3.providers.flash_attn_3 import FA3_FWD, FLASH_ATTN_3
from diffusers_fa3.providers.flash_attn_4 import FLASH_ATTN_4
from diffusers_fa3.providers.hub import HUB
from diffusers_fa3.providers.reference import REFERENCE
from diffusers_fa3.providers.selection import KernelChoice, Selector
from diffusers_fa3.providers.serving import SGL_KERNEL, VLLM
from diffusers_fa3.providers.table import KernelRow, KernelTable
from diffusers_fa3.providers.torch_varlen import TORCH_VARLEN

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

_selector = Selector(PROVIDERS)
select = _selector.select
check_choice = _selector.check_choice
kernel_named = _selector.kernel_named


def available_kernels(device: torch.device | str | None = None) -> KernelTable:
    """Every known provider on a device: accepted, or rejected with all reasons.

    Args:
        device: where calls are to run; None is the current CUDA device, or the CPU without one.

    Returns:
        A row for each, in order of preference; printed, they are a table. Providers that serve only
        by name (their import is heavy, or downloads) are not loaded for this.
    """
    has_cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if has_cuda else "cpu") if device is None else device)
    if has_cuda and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _selector.available(read_machine(device))


__all__ = [
    "PROVIDERS",
    "Kernel",
    "KernelChoice",
    "KernelRow",
    "KernelTable",
    "Limits",
    "Machine",
    "Provider",
    "Request",
    "available_kernels",
    "check_choice",
    "kernel_named",
    "read_machine",
    "rejection_reasons",
    "select",
]
