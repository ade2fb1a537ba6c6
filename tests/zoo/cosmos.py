"""Cosmos: (B, 1, 1, K) bool masks of the text in cross attention, as the caller gives them.

Pipelines give none. With image context (Predict 2.5, Transfer 2.5) a layer makes two cross
attention calls, and diffusers itself fails if there is a mask.
"""

from __future__ import annotations

import torch
from diffusers import CosmosTransformer3DModel

from .case import ANY_MASK, BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

HEADS = 2
HEAD_DIM = 128
WIDTH = HEADS * HEAD_DIM
FRAMES = 2
IMAGE_TOKENS = 3


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, FRAMES, 8, 8),
        "timestep": timesteps(),
        "encoder_hidden_states": text,
        "attention_mask": mask,
        "fps": 16,
    }


def _video_to_world_inputs(layout: Layout, pads: float) -> Inputs:
    condition = torch.zeros(BATCH, 1, FRAMES, 8, 8)
    condition[:, :, 0] = 1.0
    of_frames = torch.tensor([0.1, 1.0])  # the first one is given
    return {
        **_inputs(layout, pads),
        "condition_mask": condition,
        "timestep": timesteps()[:, None, None, None, None] * of_frames[:, None, None],
    }


def image_context() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(BATCH, TEXT, 12, seed=1), randn(BATCH, IMAGE_TOKENS, 16, seed=2)


def _image_context_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs("none", pads), "encoder_hidden_states": image_context()}


SHARED = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "mlp_ratio": 1.0,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
    "extra_pos_embed_type": None,  # the learnable one fails in float64
}
CONFIG = {
    **SHARED,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "text_embed_dim": 16,
    "concat_padding_mask": False,  # needs torchvision
}
IMAGE_CONTEXT = {
    **SHARED,
    "text_embed_dim": 16,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 12,
    "encoder_hidden_states_channels": 16,
    "img_context_dim_in": 16,
    "img_context_dim_out": WIDTH,
}

CASES = (
    Case(
        name="cosmos",
        model=CosmosTransformer3DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="cosmos_video_to_world",
        model=CosmosTransformer3DModel,
        config={**CONFIG, "in_channels": 5},
        inputs=_video_to_world_inputs,
        layouts=("none", "ragged"),
    ),
    Case(
        name="cosmos_image_context",
        since="0.37.0",
        model=CosmosTransformer3DModel,
        config={**CONFIG, **IMAGE_CONTEXT, "img_context_num_tokens": IMAGE_TOKENS},
        inputs=_image_context_inputs,
    ),
)
