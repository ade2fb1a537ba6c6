"""The kernels that are installed on this machine: what the tests of this folder run on."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from diffusers_fa3.kernels import PROVIDERS, available_kernels, read_machine
from diffusers_fa3.kernels.contract import Machine, rejection_reasons
from diffusers_fa3.kernels.installed import kernel_named


def machine() -> Machine:
    """This one."""
    return read_machine(torch.device("cuda", 0))


def usable() -> list[str]:
    """Kernels that have code for this GPU, those too that serve only by name.

    Without a CUDA device none of them is asked. The hub's kernel is no package: it would have to be
    downloaded.
    """
    if not torch.cuda.is_available():
        return []
    names = [row.name for row in available_kernels("cuda") if row.accepted]
    for provider in PROVIDERS:
        asked_for = provider.on_request and provider.name != "hub"
        if asked_for and provider.name not in names and all(map(find_spec, provider.modules)):
            limits = kernel_named(provider.name).limits
            names += [] if rejection_reasons(limits, machine(), None) else [provider.name]
    return [name for name in names if name != "reference"]
