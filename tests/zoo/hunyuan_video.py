"""HunyuanVideo and HunyuanVideo 1.5: a token refiner, then joint blocks over [video, text, pads].

HunyuanVideo's refiner masks outer(valid, valid) with the first key visible to every row, so that
no row is empty; its joint mask is plain padding on the right, whatever the layout of the text.
HunyuanVideo 1.5 masks outer(valid, valid) everywhere, after moving valid text to the front.
"""

from __future__ import annotations

import torch
from diffusers import HunyuanVideo15Transformer3DModel, HunyuanVideoTransformer3DModel

from .case import (
    BATCH,
    RIGHT_ONLY,
    Case,
    Inputs,
    Layout,
    Refusal,
    prompt,
    randn,
    timesteps,
)

GLYPHS = 6  # padded length of the second, glyph-aware text encoder
IMAGE_EMBEDS = 3


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, 1, 4, 4),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "pooled_projections": randn(BATCH, 8, seed=2),
        "guidance": timesteps(1000),
    }


def _inputs_15(layout: Layout, pads: float, image: torch.Tensor) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    glyphs, glyph_mask = prompt(layout, 8, pads, length=GLYPHS, seed=3)
    return {
        "hidden_states": randn(BATCH, 4, 1, 4, 4),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": glyph_mask,
        "image_embeds": image,
    }


def _inputs_15_t2v(layout: Layout, pads: float) -> Inputs:
    # All-zero image embeddings mean text-to-video: the model masks them, even in "all_true".
    return _inputs_15(layout, pads, torch.zeros(BATCH, IMAGE_EMBEDS, 12))


def _inputs_15_i2v(layout: Layout, pads: float) -> Inputs:
    return _inputs_15(layout, pads, randn(BATCH, IMAGE_EMBEDS, 12, seed=4))


SHARED = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
}
CONFIG_15 = {**SHARED, "text_embed_2_dim": 8, "image_embed_dim": 12, "target_size": 16}

CASES = (
    Case(
        name="hunyuan_video",
        model=HunyuanVideoTransformer3DModel,
        config={
            **SHARED,
            "num_single_layers": 1,
            "guidance_embeds": True,
            "pooled_projection_dim": 8,
        },
        inputs=_inputs,
        layouts=RIGHT_ONLY,
        refusal=Refusal(layer=r"token_refiner", reason=r"query"),
    ),
    Case(
        name="hunyuan_video15_t2v",
        model=HunyuanVideo15Transformer3DModel,
        config={**CONFIG_15, "task_type": "t2v"},
        inputs=_inputs_15_t2v,
        layouts=("all_true", "right", "left", "ragged", "gap"),
    ),
    Case(
        name="hunyuan_video15_i2v",
        model=HunyuanVideo15Transformer3DModel,
        config={**CONFIG_15, "task_type": "i2v"},
        inputs=_inputs_15_i2v,
        layouts=("all_true", "right", "ragged"),
    ),
)
