"""Which kernel serves a call, and how it is called. Importing this imports no kernel.

Read `contract` first: what a kernel can do, what a call asks, and the one calling convention.
Then `selection` and `installed` (which kernel serves), and `providers/` (where each comes from).
A provider binds its package by `raw_op` or `public_function`, with the help of `signature`, `out`,
`adapt` and `build_flags`. `compiled` is the kernel call inside a graph, `table` what is printed.

Nothing here knows masks or diffusers. A kernel's package is imported by its provider's `load` only.
"""

from __future__ import annotations

from diffusers_fa3.kernels.adapt import without_keys
from diffusers_fa3.kernels.compiled import (
    GraphKernel,
    declined,
    executed,
    graph_kernel,
    note_declined,
)
from diffusers_fa3.kernels.contract import Kernel, Request, read_machine
from diffusers_fa3.kernels.installed import available_kernels, check_choice, select
from diffusers_fa3.kernels.out import call_kernel, check_out, needs_grad
from diffusers_fa3.kernels.providers import PROVIDERS
from diffusers_fa3.kernels.selection import KernelChoice

__all__ = [
    "PROVIDERS",
    "GraphKernel",
    "Kernel",
    "KernelChoice",
    "Request",
    "available_kernels",
    "call_kernel",
    "check_choice",
    "check_out",
    "declined",
    "executed",
    "graph_kernel",
    "needs_grad",
    "note_declined",
    "read_machine",
    "select",
    "without_keys",
]
