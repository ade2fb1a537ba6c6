"""Tiny models of diffusers' own classes for parity tests, one file per family."""

from __future__ import annotations

import importlib
import pkgutil

from .case import Case, Layout

# Every file of this folder that defines CASES is a family; these hold what families share.
SHARED = ("budget", "case", "watch")
FAMILIES = tuple(
    module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED
)

CASES: tuple[Case, ...] = tuple(
    case for family in FAMILIES for case in importlib.import_module(f".{family}", __name__).CASES
)
RUNS: tuple[tuple[Case, Layout], ...] = tuple(
    (case, layout) for case in CASES for layout in case.layouts
)
RUN_IDS: tuple[str, ...] = tuple(f"{case.name}-{layout}" for case, layout in RUNS)

__all__ = ["CASES", "RUNS", "RUN_IDS", "Case", "Layout"]
