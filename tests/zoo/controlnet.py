"""ControlNets of Stable Diffusion and of Stable Diffusion XL: no text masks.

The mask that they take is one of image tokens; it reaches self attention, additive, per head.
ControlNetUnionModel mixes its conditions in torch's own nn.MultiheadAttention; the case has none.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNetControlNetXSModel

from .case import BATCH, TEXT, Case, Inputs, Layout, key_mask, randn, timesteps
from .unet import ENCODER, ENCODER_XL, TEXT_WIDTH, added_conditions

CONTROL_TYPES = 6
HINT = {"conditioning_embedding_out_channels": (8, 8)}  # takes images of twice the latent's size


def residuals(returned: tuple[Any, torch.Tensor]) -> torch.Tensor:
    """Return what a ControlNet adds to the skip connections and the middle of a UNet."""
    skips, middle = returned
    return torch.cat([tensor.flatten(1) for tensor in (*skips, middle)], dim=1)


def _sample(size: int) -> Inputs:
    return {
        "sample": randn(BATCH, 4, size, size),
        "timestep": timesteps(1000),
        "encoder_hidden_states": randn(BATCH, TEXT, TEXT_WIDTH, seed=1),
    }


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {**_sample(8), "controlnet_cond": randn(BATCH, 3, 16, 16, seed=2)}


def _image_mask_inputs(layout: Layout, pads: float) -> Inputs:
    return {
        **_sample(4),
        "controlnet_cond": randn(BATCH, 3, 8, 8, seed=2),
        "attention_mask": key_mask(layout, 16),
    }


def _union_inputs(layout: Layout, pads: float) -> Inputs:
    types = torch.zeros(BATCH, CONTROL_TYPES)
    types[:, [1, 4]] = 1.0
    return {
        **_sample(8),
        "controlnet_cond": [randn(BATCH, 3, 16, 16, seed=seed) for seed in (2, 3)],
        "control_type": types,
        "control_type_idx": [1, 4],
        "added_cond_kwargs": added_conditions(),
    }


CASES = (
    Case(
        name="controlnet",
        model=ControlNetModel,
        config={**ENCODER, **HINT},
        inputs=_inputs,
        pick=residuals,
    ),
    Case(
        name="controlnet_image_mask",
        model=ControlNetModel,
        config={
            **ENCODER,
            **HINT,
            "block_out_channels": (80,),  # a mask fits one resolution only
            "down_block_types": ("CrossAttnDownBlock2D",),
        },
        inputs=_image_mask_inputs,
        layouts=("all_true", "ragged", "gap"),
        pick=residuals,
        pads=False,  # hidden image tokens are still seen by convolutions
    ),
    Case(
        name="controlnet_union",
        model=ControlNetUnionModel,
        config={
            **ENCODER_XL,
            **HINT,
            "num_control_type": CONTROL_TYPES,
            "num_trans_layer": 0,  # of nn.MultiheadAttention
            "num_trans_channel": 64,
            "num_proj_channel": 64,
        },
        inputs=_union_inputs,
        pick=residuals,
    ),
    Case(
        name="controlnet_xs",
        model=UNetControlNetXSModel,
        config={
            "sample_size": 8,
            "block_out_channels": (64, 128),
            "norm_num_groups": 8,
            "cross_attention_dim": TEXT_WIDTH,
            "num_attention_heads": (1, 2),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "ctrl_conditioning_embedding_out_channels": (8, 8),
            "ctrl_block_out_channels": (16, 64),
            "ctrl_num_attention_heads": 1,
            "ctrl_max_norm_num_groups": 8,
        },
        inputs=_inputs,
    ),
)
