"""HiDream-I1: no attention mask, though its processor takes one for images that are not square.

These are padded to the largest number of patches, and the mask sets the keys of the padding to 0,
which leaves them in the softmax.
"""

from __future__ import annotations

from diffusers import HiDreamImageTransformer2DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "timesteps": timesteps(1000),
        "encoder_hidden_states_t5": randn(BATCH, TEXT, 16, seed=1),
        "encoder_hidden_states_llama3": randn(2, BATCH, TEXT, 8, seed=2),
        "pooled_embeds": randn(BATCH, 8, seed=3),
    }


def _wide_inputs(layout: Layout, pads: float) -> Inputs:
    return {**_inputs(layout, pads), "hidden_states": randn(BATCH, 4, 4, 8)}


CONFIG = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "caption_channels": (16, 8),
    "text_emb_dim": 8,
    "num_routed_experts": 2,  # all are active: rounding cannot change the choice
    "num_activated_experts": 2,
    "axes_dims_rope": (64, 32, 32),
    "max_resolution": (8, 8),
    "llama_layers": (0, 1),
}

CASES = (
    Case(
        name="hidream",
        model=HiDreamImageTransformer2DModel,
        config=CONFIG,
        inputs=_inputs,
    ),
    Case(
        name="hidream_wide_image",
        model=HiDreamImageTransformer2DModel,
        config=CONFIG,
        inputs=_wide_inputs,
    ),
)
