"""`diffusers-fa3 info`: what this machine has, what "auto" takes on it, and what is in the way.

Reading order: `report` puts the parts together. `machine`, `builds`, `choices`, `conflicts` and
`model` read facts; `advice` says what follows from them; `probe` tries kernels in processes of
their own, which run `launch`. `show` prints.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_fa3.tools.info.report import MachineReport, machine_report

__all__ = ["MachineReport", "machine_report"]


def __getattr__(name: str) -> Any:
    """Import a public name, and diffusers with it, when it is first used."""
    if name in __all__:
        return getattr(import_module("diffusers_fa3.tools.info.report"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
