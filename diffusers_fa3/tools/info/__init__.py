"""`diffusers-fa3 info`: what this machine has, what "auto" takes on it, and what is in the way.

Reading order: `report` puts the parts together. `machine`, `builds`, `choices`, `conflicts` and
`model` read facts; `advice` says what follows from them; `probe` tries kernels in processes of
their own, which run `launch`. `show` prints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers_fa3.lazy import lazily

if TYPE_CHECKING:
    from diffusers_fa3.tools.info.report import MachineReport, machine_report

__all__ = ["MachineReport", "machine_report"]

__getattr__ = lazily(__name__, dict.fromkeys(__all__, "report"))  # with diffusers
