"""Whole pipelines of tiny random components, as a user assembles them; one file per family."""

from __future__ import annotations

from . import (
    chroma,
    flux,
    ltx,
    modular,
    pixart,
    qwenimage,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    wan,
)
from .case import PipelineCase

CASES: tuple[PipelineCase, ...] = (
    *flux.CASES,
    *stable_diffusion_3.CASES,
    *qwenimage.CASES,
    *pixart.CASES,
    *stable_diffusion.CASES,
    *stable_diffusion_xl.CASES,
    *chroma.CASES,
    *ltx.CASES,
    *wan.CASES,
    *modular.CASES,
)

__all__ = ["CASES", "PipelineCase"]
