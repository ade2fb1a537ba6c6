"""Sana, its ControlNet and Sana-Video: linear self attention, softmax cross attention over text.

The mask of the text is additive, -1e4, per head, rebuilt in every layer; the mask of the image is
never used. Linear self attention has no softmax, so there is nothing to switch in it.
"""

from __future__ import annotations

import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel, SanaVideoTransformer3DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, Refusal, prompt, randn, timesteps

CAPTION = 16

SHARED = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 224,
    "caption_channels": CAPTION,
    "mlp_ratio": 0.5,
    "sample_size": 4,
}
CONFIG = {**SHARED, "num_attention_heads": 7, "attention_head_dim": 32}

LINEAR = Refusal(layer=r"attn1$", reason=r"makes no attention call")


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, CAPTION, pads)
    return {
        "hidden_states": randn(BATCH, 4, 4, 4),
        "encoder_hidden_states": text,
        "timestep": timesteps(1000),
        "encoder_attention_mask": mask,
    }


def _controlnet_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "controlnet_cond": randn(BATCH, 4, 4, 4, seed=2)}


def _video_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "hidden_states": randn(BATCH, 4, 2, 8, 8)}


CASES = (
    Case(
        name="sana",
        model=SanaTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
        refusal=LINEAR,
    ),
    Case(
        name="sana_controlnet",
        model=SanaControlNetModel,
        config=CONFIG,
        inputs=_controlnet_inputs,
        layouts=ANY_MASK,
        refusal=LINEAR,
        pick=lambda returned: torch.stack(list(returned[0])),
    ),
    Case(
        name="sana_video",
        model=SanaVideoTransformer3DModel,
        config={**SHARED, "num_attention_heads": 2, "attention_head_dim": 112},
        inputs=_video_inputs,
        layouts=ANY_MASK,
        refusal=LINEAR,
    ),
)
