"""Chroma: masks [text, pads, image] as outer(valid, valid), so padded query rows are empty."""

from __future__ import annotations

from diffusers import ChromaTransformer2DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps
from .flux import IMAGE, joint_mask, position_ids


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 32, pads)
    return {
        "hidden_states": randn(BATCH, IMAGE, 4),
        "encoder_hidden_states": text,
        "timestep": timesteps(),
        **position_ids(),
        "attention_mask": None if mask is None else joint_mask(mask),
    }


CASES = (
    Case(
        name="chroma",
        model=ChromaTransformer2DModel,
        config={
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 128,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (16, 56, 56),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
