"""Kandinsky 5: a text encoder, then video blocks with self and cross attention; no masks.

NABLA gives the self attention of video a BlockMask, of 64-token blocks that score high on the means
of queries and keys: it differs between samples, heads, layers and steps. Diffusers leaves it to the
caller to set the flex backend, without which it fails. Without torch.compile, flex_attention does
not heed it: what runs here is dense.
"""

from __future__ import annotations

import torch
from diffusers import Kandinsky5Transformer3DModel
from torch import nn

from .case import BATCH, TEXT, Case, Inputs, Layout, cast_input, randn, timesteps

CONFIG = {
    "in_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 32,
    "out_visual_dim": 4,
    "model_dim": 128,
    "ff_dim": 64,
    # Rotary embeddings are rounded to bfloat16 in any dtype: a second block would see roundings
    # that flip, and the error of the default attention would say nothing.
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
}


def _prepare(model: nn.Module) -> None:
    cast_input(model.time_embeddings.in_layer)  # diffusers leaves that module in float32


def _prepare_nabla(model: nn.Module) -> None:
    _prepare(model)
    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = "flex"


def _inputs(layout: Layout, pads: float, frames: int = 1, side: int = 4) -> Inputs:
    return {
        "hidden_states": randn(BATCH, frames, 2 * side, 2 * side, 4),
        "encoder_hidden_states": randn(BATCH, TEXT, 16, seed=1),
        "timestep": timesteps(1000),
        "pooled_projections": randn(BATCH, 8, seed=2),
        "visual_rope_pos": [torch.arange(frames), torch.arange(side), torch.arange(side)],
        "text_rope_pos": torch.arange(TEXT),
    }


def _nabla_inputs(layout: Layout, pads: float) -> Inputs:
    # A frame of 8x8 tokens is a block; its only neighbour is itself.
    neighbours = torch.eye(3, dtype=torch.bool)[None, None]
    sparse = {"sta_mask": neighbours, "to_fractal": True, "P": 0.5}
    return {**_inputs(layout, pads, frames=3, side=8), "sparse_params": sparse}


CASES = (
    Case(
        name="kandinsky5",
        model=Kandinsky5Transformer3DModel,
        config=CONFIG,
        inputs=_inputs,
        prepare=_prepare,
        pick=lambda returned: returned,
    ),
    Case(
        name="kandinsky5_nabla",
        model=Kandinsky5Transformer3DModel,
        config={**CONFIG, "attention_type": "nabla"},
        inputs=_nabla_inputs,
        prepare=_prepare_nabla,
        pick=lambda returned: returned,
        unreached="self attention of video is set to flex_attention, for a BlockMask",
    ),
)
