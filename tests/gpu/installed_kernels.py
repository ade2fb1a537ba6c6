"""The kernels that are installed on this machine: what the tests of this folder run on."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from diffusers_fa3.providers import (
    PROVIDERS,
    Machine,
    kernel_named,
    read_machine,
    rejection_reasons,
)


def machine() -> Machine:
    """This one."""
    return read_machine(torch.device("cuda"))


def installed() -> list[str]:
    """Providers whose packages are here, those too that serve only by name.

    One that fails to load fails its tests. Without a CUDA device none of them is asked. The hub's
    kernel is no package: it would have to be downloaded.
    """
    if not torch.cuda.is_available():
        return []
    here = [p for p in PROVIDERS if p.name != "hub" and all(map(find_spec, p.modules))]
    return [p.name for p in here if p.cuda]


def usable() -> list[str]:
    """Those of them that have code for this GPU."""
    return [
        name
        for name in installed()
        if not rejection_reasons(kernel_named(name).limits, machine(), None)
    ]
