"""Cosmos 3: one request is packed, with grouped heads and without a mask.

Causal attention of the text, then attention of all that is generated to [text, generated], Sq < Sk.
"""

from __future__ import annotations

import torch
from diffusers import Cosmos3OmniTransformer

from .case import TEXT, Case, Inputs, Layout, randn

HEAD_DIM = 128
IMAGE = 16  # tokens


def _inputs(layout: Layout, pads: float) -> Inputs:
    length = TEXT + IMAGE
    image = torch.arange(TEXT, length)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": length,
        "vision_tokens": [randn(1, 4, 1, 8, 8)],
        "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": image,
        # One row early: nothing but the text's last row sees the last of the causal calls.
        "vision_mse_loss_indexes": image - 1,
        "vision_timesteps": torch.full((IMAGE,), 500.0),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


CASES = (
    Case(
        name="cosmos3",
        model=Cosmos3OmniTransformer,
        config={
            "head_dim": HEAD_DIM,
            "hidden_size": 64,
            "intermediate_size": 64,
            "latent_channel": 4,
            "latent_patch_size": 2,
            "patch_latent_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": TEXT,
        },
        inputs=_inputs,
        pick=lambda returned: returned[0][0],  # one image, no sound, no action
    ),
)
