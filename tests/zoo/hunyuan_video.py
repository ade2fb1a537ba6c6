"""HunyuanVideo, its Framepack, and HunyuanVideo 1.5: a token refiner, then joint blocks.

HunyuanVideo's refiner masks outer(valid, valid) with the first key visible to every row, so that
no row is empty; its joint mask over [video, text, pads] is plain padding on the right, whatever the
layout of the text. Framepack puts history in front of the video and an image in front of the text;
a single sample's text is cut in place of the joint mask. HunyuanVideo 1.5 masks outer(valid, valid)
everywhere, after moving valid text to the front.
"""

from __future__ import annotations

import torch
from diffusers import (
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)

from .case import BATCH, RIGHT_ONLY, Case, Inputs, Layout, prompt, randn, timesteps

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


def _framepack_inputs(layout: Layout, pads: float) -> Inputs:
    return {
        **_inputs(layout, pads),
        "hidden_states": randn(BATCH, 4, 1, 8, 8),
        "indices_latents": torch.tensor([8]),
        "latents_clean": randn(BATCH, 4, 2, 8, 8, seed=3),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": randn(BATCH, 4, 2, 8, 8, seed=4),
        "indices_latents_history_2x": torch.tensor([5, 6]),
        "latents_history_4x": randn(BATCH, 4, 4, 8, 8, seed=5),
        "indices_latents_history_4x": torch.tensor([1, 2, 3, 4]),
        "image_embeds": randn(BATCH, IMAGE_EMBEDS, 12, seed=6),
    }


def _framepack_inputs_alone(layout: Layout, pads: float) -> Inputs:
    batch = _framepack_inputs(layout, pads)
    return {
        name: value if name.startswith("indices") else value[-1:] for name, value in batch.items()
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
CONFIG = {
    **SHARED,
    "num_single_layers": 1,
    "guidance_embeds": True,
    "pooled_projection_dim": 8,
}
CONFIG_FRAMEPACK = {
    **CONFIG,
    "patch_size": 2,  # the size that the history's embedder is made for
    "has_image_proj": True,
    "image_proj_dim": 12,
    "has_clean_x_embedder": True,
}
CONFIG_15 = {**SHARED, "text_embed_2_dim": 8, "image_embed_dim": 12, "target_size": 16}

CASES = (
    Case(
        name="hunyuan_video",
        model=HunyuanVideoTransformer3DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=RIGHT_ONLY,
    ),
    Case(
        name="hunyuan_video_framepack",
        model=HunyuanVideoFramepackTransformer3DModel,
        config=CONFIG_FRAMEPACK,
        inputs=_framepack_inputs,
        layouts=RIGHT_ONLY,
    ),
    Case(
        name="hunyuan_video_framepack_alone",
        model=HunyuanVideoFramepackTransformer3DModel,
        config=CONFIG_FRAMEPACK,
        inputs=_framepack_inputs_alone,
        layouts=("all_true", "right"),
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
