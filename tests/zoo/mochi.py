"""Mochi: the processor drops padded text tokens itself, sample by sample, and passes no mask.

Its text pooling, outside any processor, masks [pooled, text, pads]: one query for each sample.
"""

from __future__ import annotations

from diffusers import MochiTransformer3DModel

from .case import BATCH, Case, Inputs, Layout, prompt, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, 1, 8, 8),
        "encoder_hidden_states": text,
        "timestep": timesteps(1000),
        "encoder_attention_mask": mask,
    }


CASES = (
    Case(
        name="mochi",
        model=MochiTransformer3DModel,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 128,
            "num_layers": 2,  # the last one leaves the text alone
            "pooled_projection_dim": 64,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
        },
        inputs=_inputs,
        layouts=("all_true", "right", "left", "ragged", "gap"),
        outside=1,
    ),
)
