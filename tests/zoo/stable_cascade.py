"""Stable Cascade's prior and decoder: image queries over [image, conditioning], without a mask.

The prior is conditioned on text and image tokens, the decoder on pooled text alone, and its
first levels have no attention.
"""

from __future__ import annotations

from diffusers import StableCascadeUNet

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps

BLOCK = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "sample": randn(BATCH, 4, 8, 8),
        "timestep_ratio": timesteps(),
        "clip_text_pooled": randn(BATCH, 1, 16, seed=1),
    }


def _prior_inputs(layout: Layout, pads: float) -> Inputs:
    return {
        **_inputs(layout, pads),
        "clip_text": randn(BATCH, TEXT, 16, seed=2),
        "clip_img": randn(BATCH, 1, 8, seed=3),
    }


def _decoder_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "effnet": randn(BATCH, 4, 4, 4, seed=2)}


SHARED = {
    "in_channels": 4,
    "out_channels": 4,
    "timestep_ratio_embedding_dim": 16,
    "conditioning_dim": 32,
    "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1),
    "clip_text_pooled_in_channels": 16,
}

CASES = (
    Case(
        name="stable_cascade_prior",
        model=StableCascadeUNet,
        config={
            **SHARED,
            "block_out_channels": (128, 128),
            "num_attention_heads": (2, 2),
            "block_types_per_layer": (BLOCK, BLOCK),
            "clip_text_in_channels": 16,
            "clip_image_in_channels": 8,
            "switch_level": (False,),
        },
        inputs=_prior_inputs,
    ),
    Case(
        name="stable_cascade_decoder",
        model=StableCascadeUNet,
        config={
            **SHARED,
            "block_out_channels": (32, 128),
            "num_attention_heads": (-1, 2),
            "block_types_per_layer": (BLOCK[:2], BLOCK),
            "patch_size": 2,
            "effnet_in_channels": 4,
            "timestep_conditioning_type": ("sca",),
        },
        inputs=_decoder_inputs,
    ),
)
