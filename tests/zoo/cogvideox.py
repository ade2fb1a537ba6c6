"""CogVideoX: one joint sequence of text and video, no mask."""

from __future__ import annotations

from diffusers import CogVideoXTransformer3DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 2, 4, 8, 8),
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
        "timestep": timesteps(1000),
    }


CASES = (
    Case(
        name="cogvideox",
        model=CogVideoXTransformer3DModel,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
        },
        inputs=_inputs,
    ),
)
