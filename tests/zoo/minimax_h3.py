"""MiniMax-H3: a text refiner, then one packed sequence of text, audio and video; no mask."""

from __future__ import annotations

import torch
from diffusers import MiniMaxH3Transformer3DModel

from .case import BATCH, TEXT, Case, Inputs, Layout, randn

AUDIO = 6
VIDEO = 16


def both(returned: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the video and the audio that a model predicts, in one tensor."""
    return torch.cat([tensor.flatten(1) for tensor in returned], dim=1)


def _inputs(layout: Layout, pads: float) -> Inputs:
    length = TEXT + AUDIO + VIDEO
    text, audio, video = torch.arange(length).split((TEXT, AUDIO, VIDEO))
    tags = torch.tensor([1] * TEXT + [2] * AUDIO + [0] * VIDEO)
    positions = torch.arange(length)[:, None].repeat(1, 3)
    positions[video] = torch.cartesian_prod(torch.tensor([TEXT]), *[torch.arange(4)] * 2)
    return {
        "hidden_states": randn(BATCH, VIDEO, 16),
        "audio_hidden_states": randn(BATCH, AUDIO, 8, seed=1),
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=2),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),  # the audio has a time of its own
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


CASES = (
    Case(
        name="minimax_h3",
        model=MiniMaxH3Transformer3DModel,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 128,
            "hidden_size": 64,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 64,
            "in_channels": 4,
            "audio_in_channels": 8,
            "text_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
        },
        inputs=_inputs,
        pick=both,
    ),
)
