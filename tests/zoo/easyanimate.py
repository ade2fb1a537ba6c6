"""EasyAnimate: joint attention over [text, video], no mask.

Blocks from `mmdit_layers` on project both parts with the same weights.
"""

from __future__ import annotations

from diffusers import EasyAnimateTransformer3DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 4, 2, 8, 8),
        "timestep": timesteps(1000),
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
    }


CASES = (
    Case(
        name="easyanimate",
        model=EasyAnimateTransformer3DModel,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 16,
            "text_embed_dim": 16,
        },
        inputs=_inputs,
    ),
)
