"""UNetSpatioTemporalConditionModel of Stable Video Diffusion: no masks.

The image is a single token, so every cross attention has one key.
"""

from __future__ import annotations

import torch
from diffusers import UNetSpatioTemporalConditionModel

from .case import BATCH, Case, Inputs, Layout, randn, timesteps

FRAMES = 3
IMAGE_WIDTH = 32


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "sample": randn(BATCH, FRAMES, 8, 4, 4),
        "timestep": timesteps(1000),
        "encoder_hidden_states": randn(BATCH, 1, IMAGE_WIDTH, seed=1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(BATCH, 1),
    }


CASES = (
    Case(
        name="unet_spatio_temporal",
        model=UNetSpatioTemporalConditionModel,
        config={
            "sample_size": 4,
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "cross_attention_dim": IMAGE_WIDTH,
            "num_attention_heads": (1, 2),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
        inputs=_inputs,
    ),
)
