"""Kandinsky 6: video and audio, each with a text stream of its own.

The bool mask of the text stays two-dimensional, [B, K], up to the attention call: in the text
blocks, where B, Sq and Sk could be confused, and in cross attention. It is one tensor throughout.
"""

from __future__ import annotations

import torch
from diffusers import Kandinsky6Transformer3DModel

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, prompt, randn, timesteps

AUDIO = 10


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 1, 8, 8, 9),  # latent, condition and its mask
        "encoder_hidden_states": text,
        "pooled_projections": randn(BATCH, 8, seed=2),
        "timestep": timesteps(1000),
        "audio_hidden_states": randn(BATCH, AUDIO, 5, seed=3),
        "encoder_attention_mask": mask,
    }


def _video_and_audio(returned: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.cat([sample.flatten(1) for sample in returned], 1)


CASES = (
    Case(
        name="kandinsky6",
        model=Kandinsky6Transformer3DModel,
        config={
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 32,
            "model_dim": 256,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "in_audio_dim": 5,
            "out_audio_dim": 5,
            "text_token_padding": True,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
        },
        inputs=_inputs,
        layouts=ANY_MASK,
        pick=_video_and_audio,
    ),
)
