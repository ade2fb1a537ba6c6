"""Which kernel serves a call, and how each kernel is called. Importing this imports no kernel.

Reading order: `contract` has what a kernel can do, what a call asks, and the calling convention of
all kernels. `selection` and `installed` choose the kernel. `providers/` has one file per kernel
package. A provider binds its package with `raw_op` or `public_function`, which use `signature`,
`out`, `adapt` and `build_flags`. `race` times those that could serve, for
`kernel="fastest"`. `compiled` is the kernel call under torch.compile. `table` is the
result of `available_kernels`.

These files know neither masks nor diffusers. Only a provider's `load` imports a kernel package.
"""

from __future__ import annotations

from diffusers_fa3.kernels.adapt import without_keys
from diffusers_fa3.kernels.build_flags import read_flags
from diffusers_fa3.kernels.compiled import (
    GraphKernel,
    declined,
    executed,
    graph_kernel,
    note_declined,
    while_tracing,
)
from diffusers_fa3.kernels.contract import Kernel, Provider, Request, read_machine
from diffusers_fa3.kernels.installed import available_kernels, check_choice, rivals, select
from diffusers_fa3.kernels.out import (
    call_kernel,
    check_out,
    in_functional,
    is_functional,
    name_of,
    needs_grad,
    out_dtype,
)
from diffusers_fa3.kernels.providers import PROVIDERS
from diffusers_fa3.kernels.race import Choice, races
from diffusers_fa3.kernels.selection import AUTOMATIC, KernelChoice

__all__ = [
    "AUTOMATIC",
    "PROVIDERS",
    "Choice",
    "GraphKernel",
    "Kernel",
    "KernelChoice",
    "Provider",
    "Request",
    "available_kernels",
    "call_kernel",
    "check_choice",
    "check_out",
    "declined",
    "executed",
    "graph_kernel",
    "in_functional",
    "is_functional",
    "name_of",
    "needs_grad",
    "note_declined",
    "out_dtype",
    "races",
    "read_flags",
    "read_machine",
    "rivals",
    "select",
    "while_tracing",
    "without_keys",
]
