"""MiniMax Music 3: an unmasked flow-matching transformer, and a causal decoder of RVQ codes.

The decoder passes no mask but `is_causal=True`, over the few codebooks of one audio frame, at head
size 256. Its forward has no `return_dict` and returns a bare tensor.
"""

from __future__ import annotations

import torch
from diffusers import MiniMaxMusic3RVQDepthDecoder, MiniMaxMusic3Transformer1DModel

from .case import BATCH, Case, Inputs, Layout, randn, timesteps

FRAMES = 12
STEPS = 8  # codebooks of a frame
DECODER_WIDTH = 512  # two heads of 256


class DepthDecoder(MiniMaxMusic3RVQDepthDecoder):
    """The decoder, called the way a case calls a model."""

    def forward(self, inputs_embeds: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (super().forward(inputs_embeds),)


def _inputs(layout: Layout, pads: float) -> Inputs:
    return {
        "hidden_states": randn(BATCH, 8, FRAMES),
        "timestep": timesteps(),
        "encoder_hidden_states": randn(BATCH, FRAMES, 16, seed=1),
    }


def _depth_inputs(layout: Layout, pads: float) -> Inputs:
    return {"inputs_embeds": randn(BATCH, STEPS, DECODER_WIDTH)}


CASES = (
    Case(
        name="minimax_music3",
        model=MiniMaxMusic3Transformer1DModel,
        config={
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "ff_inner_dim": 64,
            "fourier_embedding_dim": 8,
        },
        inputs=_inputs,
    ),
    Case(
        name="minimax_music3_rvq",
        model=DepthDecoder,
        config={
            "hidden_size": DECODER_WIDTH,
            "num_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "audio_vocab_size": 4,
        },
        inputs=_depth_inputs,
    ),
)
