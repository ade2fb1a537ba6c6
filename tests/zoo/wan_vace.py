"""Wan VACE: as Wan, no masks; a second stack of blocks runs over the control tokens first."""

from __future__ import annotations

from diffusers import WanVACETransformer3DModel

from .case import BATCH, Case, Inputs, Layout, randn
from .wan import CONFIG, inputs


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        **inputs(layout, pads),
        "control_hidden_states": randn(BATCH, 6, 2, 8, 8, seed=2),
    }


CASES = (
    Case(
        name="wan_vace",
        model=WanVACETransformer3DModel,
        config={**CONFIG, "vace_layers": [0], "vace_in_channels": 6},
        inputs=_inputs,
    ),
)
