"""UNet2DModel: self attention over pixels, without text or mask.

Its heads are small (8) or, where the configuration gives no size, one head has all channels.
"""

from __future__ import annotations

from diffusers import UNet2DModel

from .case import BATCH, Case, Inputs, Layout, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {"sample": randn(BATCH, 3, 8, 8), "timestep": timesteps(1000)}


CONFIG = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}

CASES = (
    Case(
        name="unet_2d",
        model=UNet2DModel,
        config={**CONFIG, "block_out_channels": (16, 32), "attention_head_dim": 8},
        inputs=_inputs,
    ),
    Case(
        name="unet_2d_one_head",
        model=UNet2DModel,
        config={**CONFIG, "block_out_channels": (16, 256), "attention_head_dim": None},
        inputs=_inputs,
    ),
)
