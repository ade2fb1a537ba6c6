"""Tiny models of diffusers' own classes for parity tests, one file per family."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from releases import has

from .case import Case, Layout

# Every file of this folder that defines CASES is a family; these hold what families share.
SHARED = ("budget", "case", "watch")
MISSING: dict[str, str] = {}
"""Families and cases that the installed diffusers is too old for, and why."""


def _known() -> Iterator[Case]:
    for module in pkgutil.iter_modules(__path__):
        if module.name in SHARED:
            continue
        try:
            yield from importlib.import_module(f".{module.name}", __name__).CASES
        except ImportError as error:
            MISSING[module.name] = str(error)


KNOWN: tuple[Case, ...] = tuple(_known())
"""Of every model class that the installed diffusers has, whatever inputs it takes there."""
CASES: tuple[Case, ...] = tuple(case for case in KNOWN if has(case.since))
MISSING |= {case.name: f"since diffusers {case.since}" for case in KNOWN if not has(case.since)}
RUNS: tuple[tuple[Case, Layout], ...] = tuple(
    (case, layout) for case in CASES for layout in case.layouts
)
RUN_IDS: tuple[str, ...] = tuple(f"{case.name}-{layout}" for case, layout in RUNS)

__all__ = ["CASES", "KNOWN", "MISSING", "RUNS", "RUN_IDS", "Case", "Layout"]
