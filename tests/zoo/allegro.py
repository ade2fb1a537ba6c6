"""Allegro: cross attention with an additive -1e4 mask per head; self attention may have one, too.

The mask of self attention is one of video tokens, made of a mask of pixels that pipelines do not
pass. Self attention alone has rotary embeddings.
"""

from __future__ import annotations

import torch
from diffusers import AllegroTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from .case import ANY_MASK, BATCH, Case, Inputs, Layout, key_mask, prompt, randn, timesteps

HEAD_DIM = 96
FRAMES, SIDE = 2, 4  # in tokens


def rotary_embeddings() -> tuple[tuple[object, ...], tuple[torch.Tensor, ...]]:
    """Return the frequencies along time, height and width, and the positions of all tokens."""
    *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(
        HEAD_DIM, ((0, 0), (SIDE, SIDE)), (SIDE, SIDE), FRAMES
    )
    positions = torch.cartesian_prod(t.long(), h.long(), w.long())
    return tuple(frequencies), tuple(positions.T[:, None])


def _inputs(layout: Layout, pads: float) -> Inputs:
    text, mask = prompt(layout, 16, pads)
    return {
        "hidden_states": randn(BATCH, 4, FRAMES, 2 * SIDE, 2 * SIDE),
        "encoder_hidden_states": text,
        "timestep": timesteps(1000),
        "encoder_attention_mask": mask,
        "image_rotary_emb": rotary_embeddings(),
    }


def _video_mask_inputs(layout: Layout, pads: float) -> Inputs:
    tokens = key_mask(layout, FRAMES * SIDE * SIDE).view(BATCH, FRAMES, SIDE, SIDE)
    pixels = tokens.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    return {**_inputs(layout, pads), "attention_mask": pixels}


CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": HEAD_DIM,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "cross_attention_dim": 2 * HEAD_DIM,
    "sample_height": 2 * SIDE,
    "sample_width": 2 * SIDE,
    "sample_frames": FRAMES,
    "caption_channels": 16,
}

CASES = (
    Case(
        name="allegro",
        model=AllegroTransformer3DModel,
        config=CONFIG,
        inputs=_inputs,
        layouts=ANY_MASK,
    ),
    Case(
        name="allegro_video_mask",
        model=AllegroTransformer3DModel,
        config=CONFIG,
        inputs=_video_mask_inputs,
        layouts=("all_true", "ragged", "gap"),
        pads=False,  # hidden video tokens are returned as well
    ),
)
