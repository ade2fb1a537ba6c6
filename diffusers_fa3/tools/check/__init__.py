"""The command `diffusers-fa3 check`: your own model, on its default attention and on this one."""

from __future__ import annotations

from diffusers_fa3.tools.check.check import check_parity
from diffusers_fa3.tools.check.parity import Parity

__all__ = ["Parity", "check_parity"]
