"""Wan 2.1: no masks; image-to-video adds a second cross attention, over image tokens.

Most later video models keep these arguments: their files take the configuration from here.
"""

from __future__ import annotations

from diffusers import WanTransformer3DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps

I2V_TEXT = 512  # the processor takes all tokens but the last 512 for image tokens

CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}
I2V_CONFIG = {**CONFIG, "image_dim": 24, "added_kv_proj_dim": 256}


def inputs(layout: Layout, pads: float) -> Inputs:
    """Two frames of 4x4 tokens."""
    return {
        "hidden_states": randn(BATCH, 4, 2, 8, 8),
        "timestep": timesteps(1000),
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
    }


def i2v_inputs(layout: Layout, pads: float) -> Inputs:
    """The same with image embeddings."""
    return {
        **inputs(layout, pads),
        "encoder_hidden_states": randn(BATCH, I2V_TEXT, 16, seed=1),
        "encoder_hidden_states_image": randn(BATCH, 5, 24, seed=2),
    }


CASES = (
    Case(name="wan_t2v", model=WanTransformer3DModel, config=CONFIG, inputs=inputs),
    Case(name="wan_i2v", model=WanTransformer3DModel, config=I2V_CONFIG, inputs=i2v_inputs),
)
