"""Lumina 2: grouped queries, its own scale, a text refiner; equal lengths get no joint mask."""

from __future__ import annotations

from diffusers import Lumina2Transformer2DModel

from .case import BATCH, RIGHT_ONLY, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": text,
        "timestep": timesteps(),
        "encoder_attention_mask": mask,
    }


CASES = (
    Case(
        name="lumina2",
        model=Lumina2Transformer2DModel,
        config={
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 288,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (32, 32, 32),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 16,
        },
        inputs=_inputs,
        layouts=RIGHT_ONLY,
    ),
)
