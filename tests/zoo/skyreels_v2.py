"""SkyReels-V2: as Wan, no masks; the autoregressive diffusion-forcing mode is frame-block causal.

Its bool mask [1, 1, S, S] lets a token see all tokens of its own block of frames and of earlier
blocks: the keys of a query are a prefix that ends with its block. It is one tensor for all layers.
"""

from __future__ import annotations

import torch
from diffusers import SkyReelsV2Transformer3DModel

from .case import BATCH, Case, Inputs, Layout, randn
from .wan import CONFIG, inputs

FRAMES = 4


def _causal_inputs(layout: Layout, pads: float) -> Inputs:
    # Diffusion forcing: later frames are noisier, every frame has a time of its own.
    times = torch.linspace(100.0, 900.0, BATCH * FRAMES).view(BATCH, FRAMES)
    return {
        **inputs(layout, pads),
        "hidden_states": randn(BATCH, 4, FRAMES, 8, 8),
        "timestep": times,
        "enable_diffusion_forcing": True,
    }


CASES = (
    Case(
        name="skyreels_v2",
        model=SkyReelsV2Transformer3DModel,
        config=CONFIG,
        inputs=inputs,
    ),
    Case(
        name="skyreels_v2_causal",
        model=SkyReelsV2Transformer3DModel,
        config={**CONFIG, "num_frame_per_block": 2},
        inputs=_causal_inputs,
    ),
)
