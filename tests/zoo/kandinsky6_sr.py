"""Kandinsky 6 SR: self attention alone, always on flex_attention, by a NABLA BlockMask.

NABLA sees 64-token blocks that score high on the means of queries and keys, besides neighbours: the
mask differs between samples, heads, layers and steps. Without torch.compile, flex_attention does
not heed it: what runs here is dense.
"""

from __future__ import annotations

from diffusers import Kandinsky6SRTransformer3DModel

from .case import BATCH, Case, Inputs, Layout, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 3, 8, 8, 9),  # latent, anchor and its mask
        "timestep": timesteps(1000),
    }


CASES = (
    Case(
        name="kandinsky6_sr",
        model=Kandinsky6SRTransformer3DModel,
        config={
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 32,
            "model_dim": 128,
            "ff_dim": 64,
            "num_visual_blocks": 1,
            "nabla_threshold": 0.5,
            "nabla_window": (1, 1, 1),
        },
        inputs=_inputs,
        unreached="the mask is a BlockMask and the call is pinned to flex_attention",
    ),
)
