"""Stable Diffusion 3.5 and its ControlNet: joint attention, plus dual attention; no masks.

Its IP-Adapter makes a second attention call in each layer, to an image that a resampler has summed
up, whose scores are written by hand.
"""

from __future__ import annotations

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import nn

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
WIDTH = CONFIG["caption_projection_dim"]
PROMPT_IMAGE = (3, 24)
"""Tokens of the image that an IP-Adapter is given, and their width."""


def add_ip_adapter(transformer: nn.Module) -> None:
    """Give it a random IP-Adapter the way diffusers' loader does: processors with weights."""
    transformer.set_attn_processor(
        {
            name: SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=WIDTH,
                ip_hidden_states_dim=WIDTH,
                head_dim=CONFIG["attention_head_dim"],
                timesteps_emb_dim=64,
            )
            for name in transformer.attn_processors
        }
    )
    transformer.image_proj = IPAdapterTimeImageProjection(
        embed_dim=PROMPT_IMAGE[1], output_dim=WIDTH, hidden_dim=64, heads=1, num_queries=2
    )


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": randn(BATCH, TEXT, 32, seed=1),
        "pooled_projections": randn(BATCH, 32, seed=2),
        "timestep": timesteps(1000),
    }


def _ip_adapter_inputs(layout: Layout, pads: float) -> Inputs:
    embeds = randn(BATCH, *PROMPT_IMAGE, seed=3)
    return {
        **_inputs(layout, pads),
        "joint_attention_kwargs": {"ip_adapter_image_embeds": embeds},
    }


def _controlnet_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "controlnet_cond": randn(BATCH, 4, 8, 8, seed=3)}


CASES = (
    Case(name="sd3", model=SD3Transformer2DModel, config=CONFIG, inputs=_inputs),
    Case(
        name="sd3_ip_adapter",
        model=SD3Transformer2DModel,
        config=CONFIG,
        inputs=_ip_adapter_inputs,
        prepare=add_ip_adapter,
    ),
    Case(
        name="sd3_controlnet",
        model=SD3ControlNetModel,
        config=CONFIG,
        inputs=_controlnet_inputs,
        pick=lambda returned: torch.stack(list(returned[0])),  # one residual per block
    ),
)
