"""Stable Audio Open: bool masks of the text and of the audio, only if a caller hands them.

They have one row per head and are rebuilt in every layer; its pipeline passes neither.
"""

from __future__ import annotations

from diffusers import StableAudioDiTModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from .case import ANY_MASK, BATCH, RIGHT_ONLY, Case, Inputs, Layout, prompt, randn, timesteps

FRAMES = 12
HEAD = 64
CHANNELS = 8
WIDTH = 16  # of text and of global states

CONFIG = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 1,
    "attention_head_dim": HEAD,
    "num_attention_heads": 2,
    "num_key_value_attention_heads": 1,
    "cross_attention_dim": 64,
    "time_proj_dim": 8,
    "global_states_input_dim": WIDTH,
    "cross_attention_input_dim": WIDTH,
}


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, WIDTH, pads)
    return {
        "hidden_states": randn(BATCH, CHANNELS, FRAMES),
        "timestep": timesteps(),
        "encoder_hidden_states": text,
        "global_hidden_states": randn(BATCH, 1, WIDTH, seed=2),
        "rotary_embedding": get_1d_rotary_pos_embed(
            HEAD // 2, FRAMES + 1, use_real=True, repeat_interleave_real=False
        ),
        "encoder_attention_mask": mask,
    }


def _padded_audio_inputs(layout: Layout, pads: float) -> Inputs:
    latents, mask = prompt(layout, CHANNELS, pads, length=FRAMES)
    return {
        **_inputs("none", 0.0),
        "hidden_states": latents.transpose(1, 2),
        "attention_mask": mask,
    }


CASES = (
    Case(
        name="stable_audio",
        model=StableAudioDiTModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="stable_audio_padded_audio",
        model=StableAudioDiTModel,
        config=CONFIG,
        inputs=_padded_audio_inputs,
        layouts=RIGHT_ONLY,
        # Padded frames are returned too; the first third is valid in each of these layouts.
        pick=lambda returned: returned[0][..., : FRAMES // 3],
    ),
)
