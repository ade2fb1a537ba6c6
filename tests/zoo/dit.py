"""DiT: class labels in place of a text, one self-attention per block, no masks."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel

from .case import BATCH, Case, Inputs, Layout, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "timestep": timesteps(1000),
        "class_labels": torch.arange(BATCH),
    }


CASES = (
    Case(
        name="dit",
        model=DiTTransformer2DModel,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 72,
            "in_channels": 4,
            "num_layers": 1,
            "sample_size": 8,
        },
        inputs=_inputs,
    ),
)
