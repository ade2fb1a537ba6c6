"""Latte: spatial blocks over the images of all frames, then temporal ones over the frames.

Cross attention hands a bool mask over as it is, per head; it needs one row for each frame, and
pipelines pass none. Temporal attention has as many queries as there are frames, in a batch of all
tokens.
"""

from __future__ import annotations

from diffusers import LatteTransformer3DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps

FRAMES = 3


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, FRAMES, 8, 8),
        "timestep": timesteps(1000),
        "encoder_hidden_states": text,
        "encoder_attention_mask": None if mask is None else mask.repeat_interleave(FRAMES, dim=0),
    }


CASES = (
    Case(
        name="latte",
        model=LatteTransformer3DModel,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "cross_attention_dim": 144,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 16,
            "video_length": FRAMES,
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
