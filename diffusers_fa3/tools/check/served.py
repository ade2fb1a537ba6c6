"""The kernels that served in a check, and what their results do not tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers_fa3.tools.check.parity import Layer

ON_REFERENCE = (
    "All calls were on the reference, plain PyTorch: that says nothing of a FlashAttention-3 "
    "kernel, nor of its speed."
)


def kernels_of(layers: Iterable[Layer]) -> tuple[str, ...]:
    """The kernels of all compared calls, each once."""
    return tuple(dict.fromkeys(call.kernel for layer in layers for call in layer.calls))


def caveat_of(kernels: Iterable[str]) -> str:
    """What a reader must know of a result on these kernels; empty if there is nothing."""
    return ON_REFERENCE if {*kernels} == {"reference"} else ""
