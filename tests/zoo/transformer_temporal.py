"""TransformerTemporalModel by itself: every pixel attends over the frames, twice, unmasked."""

from __future__ import annotations

from diffusers.models import TransformerTemporalModel

from .case import BATCH, Case, Inputs, Layout, randn

FRAMES = 3


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {"hidden_states": randn(BATCH * FRAMES, 32, 4, 4), "num_frames": FRAMES}


CASES = (
    Case(
        name="transformer_temporal",
        model=TransformerTemporalModel,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 88,
            "in_channels": 32,
            "norm_num_groups": 8,
        },
        inputs=_inputs,
    ),
)
