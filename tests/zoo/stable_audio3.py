"""Stable Audio 3: a learned embedding replaces padded text, so no mask reaches attention.

By default attention is differential, the difference of two calls on their own queries and keys.
"""

from __future__ import annotations

from diffusers import StableAudio3DiTModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps

FRAMES = 12
CHANNELS = 8
WIDTH = 16  # of text and of global states

CONFIG = {
    "io_channels": CHANNELS,
    "embed_dim": 128,
    "depth": 1,
    "num_heads": 2,
    "cond_token_dim": WIDTH,
    "global_cond_dim": WIDTH,
    "local_add_cond_dim": 4,
    "timestep_features_dim": 8,
    "ff_mult": 1.0,
    "num_memory_tokens": 4,
}


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, CHANNELS, FRAMES),
        "timestep": timesteps(),
        "encoder_hidden_states": randn(BATCH, TEXT, WIDTH, seed=1),
        "global_hidden_states": randn(BATCH, WIDTH, seed=2),
    }


CASES = (
    Case(
        name="stable_audio3",
        model=StableAudio3DiTModel,
        config=CONFIG,
        inputs=_inputs,
    ),
    Case(
        name="stable_audio3_plain",
        model=StableAudio3DiTModel,
        config={**CONFIG, "use_differential_attention": False},
        inputs=_inputs,
    ),
)
