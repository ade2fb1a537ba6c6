"""UNet3DConditionModel and I2VGen-XL: attention over pixels, text and frames, without a mask.

Over the frames, every pixel is a sequence of its own. I2VGen-XL attends to [text, image] and has
one layer over the frames of the image latents, whose heads are 4 wide.
"""

from __future__ import annotations

import torch
from diffusers import I2VGenXLUNet, UNet3DConditionModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps

FRAMES = 2
TEXT_WIDTH = 32


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "sample": randn(BATCH, 4, FRAMES, 4, 4),
        "timestep": timesteps(1000),
        "encoder_hidden_states": randn(BATCH, TEXT, TEXT_WIDTH, seed=1),
    }


def _i2v_inputs(layout: Layout, pads: float) -> Inputs:
    return {
        **_inputs(layout, pads),
        "fps": torch.tensor([8, 16]),
        "image_latents": randn(BATCH, 4, FRAMES, 4, 4, seed=2),
        "image_embeddings": randn(BATCH, TEXT_WIDTH, seed=3),
    }


CONFIG = {
    "sample_size": 4,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 64,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}

CASES = (
    Case(name="unet_3d", model=UNet3DConditionModel, config=CONFIG, inputs=_inputs),
    Case(name="i2vgen_xl", model=I2VGenXLUNet, config=CONFIG, inputs=_i2v_inputs),
)
