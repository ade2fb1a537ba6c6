"""PixArt: cross attention with an additive -1e4 mask per head, rebuilt in every layer."""

from __future__ import annotations

from diffusers import PixArtTransformer2DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": text,
        "timestep": timesteps(1000),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": mask,
    }


CASES = (
    Case(
        name="pixart",
        model=PixArtTransformer2DModel,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 144,
            "sample_size": 8,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
