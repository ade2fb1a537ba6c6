"""Krea 2: grouped queries, a text-fusion transformer with its own mask, pads before the image."""

from __future__ import annotations

import torch
from diffusers import Krea2Transformer2DModel

from .case import ANY_MASK, BATCH, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

TEXT_LAYERS = 3  # hidden states of the text encoder that are stacked per token


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, TEXT_LAYERS * 32, pads)
    image = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": randn(BATCH, 16, 16),
        "encoder_hidden_states": text.unflatten(-1, (TEXT_LAYERS, 32)),
        "timestep": timesteps(),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), image]),
        "encoder_attention_mask": mask,
    }


CASES = (
    Case(
        name="krea2",
        model=Krea2Transformer2DModel,
        config={
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 32,
            "num_text_layers": TEXT_LAYERS,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (16, 24, 24),
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
