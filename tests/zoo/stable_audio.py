"""Stable Audio Open and Stable Audio 3: a mask only if a caller hands one to the older model.

StableAudioDiTModel takes bool masks of the text and of the audio, one row per head, rebuilt in
every layer; its pipeline passes neither. StableAudio3DiTModel replaces padded text by a learned
embedding before the first layer, so no mask reaches attention; by default it is differential, the
difference of two calls on their own queries and keys.
"""

from __future__ import annotations

from diffusers import StableAudio3DiTModel, StableAudioDiTModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from .case import ANY_MASK, BATCH, RIGHT_ONLY, TEXT, Case, Inputs, Layout, prompt, randn, timesteps

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
CONFIG_3 = {
    "io_channels": CHANNELS,
    "embed_dim": 2 * HEAD,
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


def _inputs_3(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, CHANNELS, FRAMES),
        "timestep": timesteps(),
        "encoder_hidden_states": randn(BATCH, TEXT, WIDTH, seed=1),
        "global_hidden_states": randn(BATCH, WIDTH, seed=2),
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
    Case(
        name="stable_audio3",
        model=StableAudio3DiTModel,
        config=CONFIG_3,
        inputs=_inputs_3,
    ),
    Case(
        name="stable_audio3_plain",
        model=StableAudio3DiTModel,
        config={**CONFIG_3, "use_differential_attention": False},
        inputs=_inputs_3,
    ),
)
