"""The kernels of this machine: what was found of them so far, and which one serves a call."""

from __future__ import annotations

import torch

from diffusers_fa3.kernels.contract import read_machine
from diffusers_fa3.kernels.providers import PROVIDERS
from diffusers_fa3.kernels.selection import Selector
from diffusers_fa3.kernels.table import KernelTable

_selector = Selector(PROVIDERS)
select = _selector.select
check_choice = _selector.check_choice
rivals = _selector.rivals
kernel_named = _selector.kernel_named


def available_kernels(device: torch.device | str | None = None) -> KernelTable:
    """Every known provider on a device: accepted, or rejected with all reasons.

    Args:
        device: where calls are to run; None is the current CUDA device, or the CPU without one.

    Returns:
        A row for each, in order of preference; printed, they are a table. Providers that serve only
        by name (their import is heavy, or downloads) are not loaded for this.

    Example:
        >>> from diffusers_fa3 import available_kernels
        >>> [row.name for row in available_kernels("cpu") if row.accepted]
        ['reference']
        >>> print(available_kernels("cpu"))
        kernel        usable  version  why not, or how `out` is served
        ...
    """
    has_cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if has_cuda else "cpu") if device is None else device)
    if has_cuda and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _selector.available(read_machine(device))
