"""Stable Diffusion 3.5 and its ControlNet: joint attention, plus dual attention; no masks."""

from __future__ import annotations

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps

CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": randn(BATCH, TEXT, 32, seed=1),
        "pooled_projections": randn(BATCH, 32, seed=2),
        "timestep": timesteps(1000),
    }


def _controlnet_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "controlnet_cond": randn(BATCH, 4, 8, 8, seed=3)}


CASES = (
    Case(name="sd3", model=SD3Transformer2DModel, config=CONFIG, inputs=_inputs),
    Case(
        name="sd3_controlnet",
        model=SD3ControlNetModel,
        config=CONFIG,
        inputs=_controlnet_inputs,
        pick=lambda returned: torch.stack(list(returned[0])),  # one residual per block
    ),
)
