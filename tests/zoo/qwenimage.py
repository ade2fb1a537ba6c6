"""Qwen-Image and its ControlNet: the mask is [text, pads, image], built anew in every layer."""

from __future__ import annotations

import torch
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 16, 16),
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask,
        "timestep": timesteps(),
        "img_shapes": [(1, 4, 4)] * BATCH,
    }


def _controlnet_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "controlnet_cond": randn(BATCH, 16, 16, seed=2)}


CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (16, 56, 56),
}

CASES = (
    Case(
        name="qwenimage",
        since="0.37.0",
        model=QwenImageTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="qwenimage_controlnet",
        since="0.37.0",
        model=QwenImageControlNetModel,
        config=CONFIG,
        inputs=_controlnet_inputs,
        layouts=ANY_MASK,
        pick=torch.cat,  # the residuals of all blocks
    ),
)
