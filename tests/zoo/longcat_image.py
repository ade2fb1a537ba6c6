"""LongCat-Image: blocks as in FLUX.1, but no way for a caller to pass a mask."""

from __future__ import annotations

from diffusers import LongCatImageTransformer2DModel

from .case import Case, Inputs, Layout
from .flux import CONFIG, joint_inputs


def _inputs(layout: Layout, pads: float) -> Inputs:
    return joint_inputs(layout, pads)[0]


CASES = (
    Case(
        name="longcat_image",
        model=LongCatImageTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
    ),
)
