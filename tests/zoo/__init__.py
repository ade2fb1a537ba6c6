"""Tiny models of diffusers' own classes for parity tests, one file per family."""

from __future__ import annotations

import importlib

from .case import Case, Layout

FAMILIES = (
    "chroma",
    "cogvideox",
    "flux",
    "hunyuan_video",
    "krea2",
    "ltx",
    "lumina2",
    "pixart",
    "prx",
    "qwenimage",
    "sd3",
    "unet",
    "wan",
    "z_image",
)

CASES: tuple[Case, ...] = tuple(
    case for family in FAMILIES for case in importlib.import_module(f".{family}", __name__).CASES
)
RUNS: tuple[tuple[Case, Layout], ...] = tuple(
    (case, layout) for case in CASES for layout in case.layouts
)
RUN_IDS: tuple[str, ...] = tuple(f"{case.name}-{layout}" for case, layout in RUNS)

__all__ = ["CASES", "RUNS", "RUN_IDS", "Case", "Layout"]
