"""ACE-Step 1.5: sliding self attention, full self attention, unmasked cross attention over text.

Sliding layers pass one additive (1, 1, S, S) band, 0 where |query - key| <= window and the lowest
float elsewhere, in every layer the same object; it is passed even where nothing lies outside the
window. So one case has a window smaller than the sequence, and one a window that covers it.
"""

from __future__ import annotations

from diffusers import AceStepTransformer1DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn, timesteps

FRAMES = 16  # two to a token
LATENTS = 8
CONTEXT = 16  # source latents and chunk mask

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,  # a sliding layer, then a full one
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "in_channels": CONTEXT + LATENTS,
    "audio_acoustic_hidden_dim": LATENTS,
    "patch_size": 2,
}


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, FRAMES, LATENTS),
        "timestep": timesteps(),
        "timestep_r": timesteps(),
        "encoder_hidden_states": randn(BATCH, TEXT, 64, seed=1),
        "context_latents": randn(BATCH, FRAMES, CONTEXT, seed=2),
    }


CASES = (
    Case(
        name="ace_step",
        model=AceStepTransformer1DModel,
        config={**CONFIG, "sliding_window": 2},
        inputs=_inputs,
    ),
    Case(
        name="ace_step_wide_window",
        model=AceStepTransformer1DModel,
        config={**CONFIG, "sliding_window": FRAMES // 2},
        inputs=_inputs,
    ),
)
