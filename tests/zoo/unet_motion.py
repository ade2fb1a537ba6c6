"""UNetMotionModel of AnimateDiff and its SparseControlNetModel: no masks.

Between the layers of a UNet, motion modules attend over the frames, every pixel by itself; those
of the ControlNet have one attention layer, those of the UNet two.
"""

from __future__ import annotations

from diffusers import SparseControlNetModel, UNetMotionModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps
from .controlnet import residuals

FRAMES = 3
TEXT_WIDTH = 32


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "sample": randn(BATCH, 4, FRAMES, 4, 4),
        "timestep": timesteps(1000),
        "encoder_hidden_states": randn(BATCH * FRAMES, TEXT, TEXT_WIDTH, seed=1),
    }


def _controlnet_inputs(layout: Layout, pads: float) -> Inputs:
    return {
        **_inputs(layout, pads),
        "controlnet_cond": randn(BATCH, 4, FRAMES, 4, 4, seed=2),
        "conditioning_mask": randn(BATCH, 1, FRAMES, 4, 4, seed=3).sign(),
    }


CONFIG = {
    "block_out_channels": (80, 160),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_WIDTH,
    "motion_num_attention_heads": 2,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
}

CASES = (
    Case(
        name="unet_motion",
        model=UNetMotionModel,
        config={
            **CONFIG,
            "num_attention_heads": 2,
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        inputs=_inputs,
    ),
    Case(
        name="sparse_controlnet",
        model=SparseControlNetModel,
        config={**CONFIG, "attention_head_dim": 2},  # the number of heads
        inputs=_controlnet_inputs,
        pick=residuals,
    ),
)
