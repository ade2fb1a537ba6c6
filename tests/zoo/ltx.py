"""LTX-Video: cross attention with an additive -1e4 mask per head, passed even if all true."""

from __future__ import annotations

from diffusers import LTXVideoTransformer3DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 2 * 4 * 4, 4),
        "encoder_hidden_states": text,
        "timestep": timesteps(1000),
        "encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


CASES = (
    Case(
        name="ltx",
        model=LTXVideoTransformer3DModel,
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "num_layers": 1,
            "caption_channels": 16,
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
