"""LongCat-AudioDiT: bool (B, K) masks of the audio and of the text, as the caller gives them.

The text mask is required; its pads are zeroed in front of the text convolutions. Both masks are on
the right in the pipeline, and the output of both attentions is multiplied by the audio mask.
"""

from __future__ import annotations

from diffusers import LongCatAudioDiTTransformer

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, key_mask, prompt, randn, timesteps

FRAMES = 12
LATENTS = 8


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, text_mask = prompt(layout, 16, pads)
    latents, audio_mask = prompt(layout, LATENTS, pads, length=FRAMES, seed=2)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text,
        "encoder_attention_mask": key_mask("all_true") if text_mask is None else text_mask,
        "timestep": timesteps(),
        "attention_mask": audio_mask,
        "latent_cond": randn(BATCH, FRAMES, LATENTS, seed=3),
    }


CASES = (
    Case(
        name="longcat_audio_dit",
        model=LongCatAudioDiTTransformer,
        config={
            "dit_dim": 128,
            "dit_depth": 1,
            "dit_heads": 2,
            "dit_text_dim": 16,
            "latent_dim": LATENTS,
            "ff_mult": 1.0,
        },
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
)
