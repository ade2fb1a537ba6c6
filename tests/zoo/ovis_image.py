"""Ovis-Image: no mask of its own; a caller may pass one over [text, image], as with FLUX.1."""

from __future__ import annotations

from diffusers import OvisImageTransformer2DModel

from .case import ANY_MASK, Case, Inputs, Layout
from .flux import CONFIG, joint_inputs, mask_kwargs


def _inputs(layout: Layout, pads: float) -> Inputs:
    inputs, mask = joint_inputs(layout, pads)
    return {**inputs, "joint_attention_kwargs": mask_kwargs(mask)}


CASES = (
    Case(
        name="ovis_image",
        since="0.37.0",
        model=OvisImageTransformer2DModel,
        config={**CONFIG, "out_channels": 4},
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
